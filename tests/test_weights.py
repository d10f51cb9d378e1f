"""A file of weights is recognised by what it says, or the question is asked: never a network that nobody trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory

import fastlora
from exports import stand_in
from fastlora.fewshot import models
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.images import Framing
from fastlora.fewshot.weights import recognise
from pictures import tiny_clip

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    """A folder with openai.pt, the weights of a small model that goes by the name of ViT-B-16."""
    with stand_in("ViT-B-16", "openai", tmp_path, SMALL):
        yield tmp_path


def activations(loaded: models.LoadedModel) -> set[str]:
    return set(loaded.network.activation.values())


def scripted(folder: Path, quick: bool) -> Path:
    """Write what OpenAI's download is: a TorchScript archive of the whole model, with three numbers beside the weights."""
    model = open_clip.create_model("ViT-B-16", force_quick_gelu=quick).eval()
    inputs = torch.randn(1, 3, 16, 16), open_clip.get_tokenizer("ViT-B-16")(["a cat"])
    for name, value in (("input_resolution", 16), ("context_length", 77), ("vocab_size", 49408)):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    path = folder / f"{quick}.pt"
    torch.jit.save(torch.jit.trace(model, inputs, check_trace=False), path)
    return path


def test_a_file_that_leaves_it_open_is_asked_about(here: Path) -> None:
    file = str(here / "openai.pt")
    with pytest.raises(
        UserError, match=r"does not say whether it was trained with QuickGELU.*--quick-gelu \(weights of OpenAI"
    ):
        models.check("ViT-B-16", file)
    with pytest.raises(UserError, match="does not say whether"):
        models.load("ViT-B-16", file, CPU)
    assert activations(models.load("ViT-B-16", file, CPU, True)) == {"quick_gelu"}
    assert activations(models.load("ViT-B-16", file, CPU, False)) == {"gelu"}
    assumed = models.load("ViT-B-16", file, CPU, assume=True)
    assert activations(assumed) == {"gelu"} and "GELU is assumed" in assumed.notes[0]


def test_random_weights_are_the_same_each_time(here: Path) -> None:
    """So that a run on them can be resumed, and its adapter be loaded again; the caller's own generator is left alone."""
    found = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(models.load("ViT-B-16", None, CPU).weights)
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] != models.load("ViT-B-16", "openai", CPU).weights


def test_a_tag_knows(here: Path) -> None:
    assert activations(models.load("ViT-B-16", "openai", CPU)) == {"quick_gelu"}
    assert activations(models.load("ViT-B-16", "openai", CPU, True)) == {"quick_gelu"}
    with pytest.raises(UserError, match="--no-quick-gelu contradicts the tag openai, which says QuickGELU"):
        models.check("ViT-B-16", "openai", False)


def test_the_model_of_the_name_knows(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {**factory._MODEL_CONFIGS, "ViT-B-16-quickgelu": SMALL | {"quick_gelu": True}, "alone": SMALL}
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", configs)
    file = str(here / "openai.pt")
    assert activations(models.load("ViT-B-16-quickgelu", file, CPU)) == {"quick_gelu"}
    with pytest.raises(UserError, match="contradicts the model ViT-B-16-quickgelu"):
        models.load("ViT-B-16-quickgelu", file, CPU, False)
    assert activations(models.load("alone", file, CPU)) == {"gelu"}  # there is no other of this name


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated, and its tracer warns of the model's branches
@pytest.mark.parametrize("quick", [True, False])
def test_a_torchscript_archive_says_it_in_its_code(here: Path, quick: bool) -> None:
    path = scripted(here, quick)
    assert recognise(path).scripted and recognise(path).quick_gelu is quick
    loaded = models.load("ViT-B-16", str(path), CPU)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = torch.jit.load(path).eval()(images, open_clip.get_tokenizer("ViT-B-16")(["a cat", "a dog"]))
        assert torch.allclose(loaded.model.encode_image(images, normalize=True), want[0], atol=1e-5)
    assert activations(loaded) == {"quick_gelu" if quick else "gelu"}
    with pytest.raises(UserError, match="contradicts"):
        models.check("ViT-B-16", str(path), not quick)


def test_the_config_beside_a_file_says_it(here: Path) -> None:
    (here / "snapshot").mkdir()
    shutil.copy(here / "openai.pt", here / "blob")
    (here / "snapshot" / "model.pt").symlink_to(here / "blob")  # as the hub's cache keeps them
    config = here / "snapshot" / "open_clip_config.json"
    squash = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash", "size": 16}
    config.write_text(json.dumps({"model_cfg": SMALL | {"quick_gelu": True}, "preprocess_cfg": squash}))
    loaded = models.load("ViT-B-16", str(here / "snapshot" / "model.pt"), CPU)
    assert activations(loaded) == {"quick_gelu"}
    assert (loaded.mean, loaded.framing.resize_mode, loaded.framing.interpolation) == ((0.5,) * 3, "squash", "bilinear")
    config.write_text("[]")
    with pytest.raises(UserError, match="is not open_clip's config of a model"):
        models.check("ViT-B-16", str(here / "snapshot" / "model.pt"))


def test_preprocessing_that_all_tags_share_is_taken(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's weights from a file: no tag of them takes CLIP's mean or cuts the centre out."""
    name = "ViT-B-16-SigLIP"
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS, name: SMALL})
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda _: open_clip.SimpleTokenizer())  # SigLIP's own has to be fetched
    loaded = models.load(name, str(here / "openai.pt"), CPU)
    assert (loaded.mean, loaded.framing.resize_mode) == ((0.5, 0.5, 0.5), "squash") and not loaded.notes
    loaded = models.load("ViT-B-16", str(here / "openai.pt"), CPU, True)  # its tags have several means
    tags = {
        tuple(open_clip.pretrained._PRETRAINED["ViT-B-16"][tag]["mean"]) for tag in open_clip.pretrained._PRETRAINED["ViT-B-16"]
    }
    assert (len(tags) > 1) == any("does not say how its images were normalised" in note for note in loaded.notes)


def test_no_weights_are_read_beside_those_of_a_folder(here: Path) -> None:
    """open_clip reads what the folder holds and ignores a file given beside it."""
    name = tiny_clip(here / "folder")
    for pretrained in (str(here / "openai.pt"), "laion2b_s34b_b79k", "nowhere.pt"):
        for call in (models.check, lambda *given: models.load(*given, CPU)):
            with pytest.raises(UserError, match=r"brings its own weights, pretrained .* would not be read: leave it out"):
                call(name, pretrained)
    models.load(name, "openai", CPU)  # what a user who names none gets


def test_an_export_is_not_loaded_as_another_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip resizes the positions to whatever size the config has."""
    loaded = models.load("ViT-B-16", "openai", CPU)
    fastlora.patch(loaded.model)
    for ending in ("safetensors", "pt"):
        fastlora.save(loaded.model, here / f"e.{ending}", format="merged")
    larger = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 32}}
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", {**factory._MODEL_CONFIGS, "ViT-B-16": larger})
    for ending in ("safetensors", "pt"):
        with pytest.raises(UserError, match="holds the weights of another network than ViT-B-16: size 16, here 32"):
            models.load("ViT-B-16", str(here / f"e.{ending}"), CPU)


def test_what_an_earlier_version_resized_is_resized_so_again(here: Path) -> None:
    name = tiny_clip(here / "folder")
    config = here / "folder" / "open_clip_config.json"
    values = json.loads(config.read_text())
    values["preprocess_cfg"] = {"resize_mode": "squash", "interpolation": "bilinear", "size": 16}
    config.write_text(json.dumps(values))
    assert models.load(name, None, CPU).framing == Framing(16, "squash", "bilinear")
    old = models.load(name, None, CPU, assume=True)
    assert old.framing == Framing(16) and old.network.preprocessing["resize_mode"] == "shortest"
