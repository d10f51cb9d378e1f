"""What a run leaves is the model that was trained, by every line that README, docs and the command print to load it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console
from torch import Tensor

import exports
import fastlora
import fastlora.mini
from fastlora.checkpoint import clip_folder
from fastlora.fewshot import evalrun, mergerun, models, trainer
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.evalrun import adapt, finished, loaded_for
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from pictures import TINY, tiny_clip

HOME = Path(__file__).resolve().parents[1]
SMALL = TINY | {
    "vision_cfg": TINY["vision_cfg"] | {"layers": 1},
    "text_cfg": TINY["text_cfg"] | {"context_length": 77, "layers": 1},
}
# Lines that build a model or what belongs to it.
LOADS = re.compile(
    r"\s*(model|tokenizer|processor)\b.* = .*(create_model|from_pretrained|get_tokenizer|mini\.build)|fastlora\.load\("
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with RUN, merged and merged.safetensors, of a small model that is served as ViT-B-16's openai weights."""
    here = tmp_path_factory.mktemp("exports")
    with exports.stand_in("ViT-B-16", "openai", here, SMALL):
        data = exports.photographs(here / "photographs", 40)
        run = exports.trained(exports.Case("ViT-B-16", "openai", 6, 8), data, here / "RUN")
        with (here / "said").open("w") as said:
            mergerun.run(run, here / "merged", "fp32", Console(file=said, width=80))
            mergerun.run(run, here / "merged.safetensors", "fp32", Console(file=said, width=80))
        yield here


@pytest.fixture(scope="module")
def truth(place: Path) -> Tensor:
    """Logits of the adapted model, whose predictions are those that the run wrote down."""
    run = RunFolder(place / "RUN")
    config, recipe = finished(run)
    loaded = loaded_for(config, recipe, torch.device("cpu"), QUIET)
    adapt(loaded.model, recipe, run)
    preprocess = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**loaded.model.visual.preprocess_cfg), is_train=False
    )
    found = _logits(place, exports.by_open_clip(loaded.model, preprocess, loaded.tokenizer))
    lines = run.predictions.read_text().splitlines()[1:]
    assert [config["classes"][i] for i in found.argmax(1)] == [line.split(",")[2] for line in lines]
    return found


def _logits(place: Path, encode: Callable[..., Any]) -> Tensor:
    classes = finished(RunFolder(place / "RUN"))[0]["classes"]
    return exports.logits(
        encode, exports.paths(place / "photographs", classes)[0], [f"a photo of a {name}." for name in classes]
    )


def _ran(place: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Run lines that load a model, and return its logits."""
    import transformers

    monkeypatch.chdir(place)
    names: dict[str, Any] = {"open_clip": open_clip, "fastlora": fastlora, "transformers": transformers, "torch": torch}
    exec("\n".join(line.strip() for line in lines), names)
    if "processor" in names:
        config = open_clip.transform.PreprocessCfg(size=SMALL["vision_cfg"]["image_size"])
        pixels = open_clip.transform.image_transform_v2(config, is_train=False)
        return _logits(place, exports.by_transformers(names["model"], names["processor"], pixels))
    tokenizer = names.get("tokenizer", open_clip.get_tokenizer("ViT-B-16"))
    return _logits(place, exports.by_open_clip(names["model"], names["preprocess"], tokenizer))


def documented() -> list[tuple[str, list[str]]]:
    """Return every block of README and docs that loads a model: where it stands, and its lines that do."""
    found = []
    for page in (HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))):
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            lines = [line for line in block.splitlines() if LOADS.match(line)]
            if any("create_model" in line or "from_pretrained" in line for line in lines):
                found.append((f"{page.name}, block {number}", lines))
    return found


@pytest.mark.parametrize("lines", [pytest.param(lines, id=where) for where, lines in documented()])
def test_a_documented_line_loads_what_was_trained(
    place: Path, truth: Tensor, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "merged" not in "".join(lines) and "fastlora.load" not in "".join(lines):
        lines = [*lines, 'fastlora.load(model, "RUN/adapter.safetensors")']  # a base model: what was trained on it fits
    assert (_ran(place, lines, monkeypatch) - truth).abs().max() < exports.EXACT


def test_every_page_that_should_has_one() -> None:
    assert {where.partition(",")[0] for where, _ in documented()} >= {"README.md", "tutorial.md"}


def test_the_lines_that_merge_prints_load_what_was_trained(place: Path, truth: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (place / "said").read_text()
    printed = re.split(r"^load it .*\n", said, flags=re.MULTILINE)[1:]
    assert len(printed) == 3 and "force_quick_gelu=True" in printed[2]
    for block in printed:
        lines = [line for line in block.splitlines() if LOADS.match(line)]
        assert lines and (_ran(place, lines, monkeypatch) - truth).abs().max() < exports.EXACT


@pytest.mark.parametrize("kind", ["local-dir", "mini"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_the_lines_for_a_file_load_it_where_the_base_has_weights_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_clip(tmp_path / "a base")
    recipe = Recipe(model="mini" if kind == "mini" else "local-dir:a base", pretrained=None, shots=1, iterations=3, lr=1e-2)
    data = exports.photographs(tmp_path / "photographs", 8)
    trainer.run(trainer.Job(recipe, str(data), tmp_path / "RUN", device="cpu", brief=True), QUIET)
    run = RunFolder(tmp_path / "RUN")
    config, recipe = finished(run)
    loaded = loaded_for(config, recipe, torch.device("cpu"), QUIET)
    adapt(loaded.model, recipe, run)
    mergerun.run(run, tmp_path / f"m.{ending}", "fp32", Console(width=80))
    lines = [line.strip() for line in capsys.readouterr().out.partition("load it with\n")[2].splitlines()]
    names: dict[str, Any] = {"open_clip": open_clip, "fastlora": fastlora}
    monkeypatch.chdir("/")  # the lines hold from anywhere
    exec("\n".join(lines), names)
    with torch.no_grad():
        images = torch.randn(2, 3, loaded.size, loaded.size)
        want, got = (model.eval().encode_image(images, normalize=True) for model in (loaded.model, names["model"]))
        assert torch.allclose(got, want, atol=1e-6)
        fastlora.unpatch(loaded.model)
        assert not torch.allclose(got, loaded.model.encode_image(images, normalize=True), atol=1e-5)


def test_the_other_activation_is_another_model(place: Path, truth: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the two tests above would measure if a line lost the activation: far beyond their bound."""
    line = 'model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-16", pretrained="merged.safetensors")'
    assert (_ran(place, [line], monkeypatch) - truth).abs().max() > 20 * exports.EXACT


def test_a_merge_that_another_network_would_load_is_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms are loaded and held against the trained model before anything is at --out."""
    run = RunFolder(place / "RUN")
    write = clip_folder.write_open_clip

    def without_quick_gelu(folder: Path, *rest: Any) -> None:
        write(folder, *rest)
        config = folder / "open_clip_config.json"
        config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))

    monkeypatch.setattr(clip_folder, "write_open_clip", without_quick_gelu)
    with pytest.raises(UserError, match="would be another: activation of text quick_gelu, here gelu"):
        mergerun.run(run, tmp_path / "merged", "fp32", QUIET)
    monkeypatch.setattr(clip_folder, "_HIDDEN_ACT", {"quick_gelu": "gelu"})
    with pytest.raises(UserError, match="as transformers loads it the model would be another: its features differ by"):
        mergerun.run(run, tmp_path / "merged", "fp32", QUIET, "transformers")
    assert not list(tmp_path.iterdir())


class TestOut:
    @pytest.mark.parametrize(
        "out, form, match",
        [
            ("merged.onnx", None, r"merge does not write \.onnx files; give a folder, or a file of weights \(\.safetensors"),
            ("merged.safetensors", "open_clip", "--form open_clip is of a folder"),
            ("merged", "onnx", "unknown form 'onnx': choose from open_clip, transformers"),
        ],
    )
    def test_is_refused(self, place: Path, tmp_path: Path, out: str, form: str | None, match: str) -> None:
        with pytest.raises(UserError, match=match):
            mergerun.run(RunFolder(place / "RUN"), tmp_path / out, "fp32", QUIET, form)
        assert not list(tmp_path.iterdir())

    def test_of_the_library_is_refused(self, tmp_path: Path) -> None:
        model = fastlora.mini.build()
        fastlora.patch(model)
        with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt, \.pth or \.bin"):
            fastlora.save(model, tmp_path / "model.onnx", format="merged")

    @pytest.mark.parametrize("dtype, size", [("fp32", 4), ("bf16", 2)])
    def test_one_form_alone(self, place: Path, tmp_path: Path, dtype: str, size: int) -> None:
        mergerun.run(RunFolder(place / "RUN"), tmp_path / "one", dtype, QUIET, "open_clip")
        assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
            "classes.json",
            "open_clip_config.json",
            "open_clip_model.safetensors",
        ]
        whole = (place / "merged" / "open_clip_model.safetensors").stat().st_size
        assert (tmp_path / "one" / "open_clip_model.safetensors").stat().st_size == pytest.approx(whole * size / 4, rel=0.02)


@pytest.mark.parametrize("name", ["merged.safetensors", "merged.pt"])
def test_a_merged_file_is_a_base_that_knows_itself(place: Path, tmp_path: Path, name: str) -> None:
    """A run may begin with what another left: nothing has to be asked."""
    mergerun.run(RunFolder(place / "RUN"), tmp_path / name, "fp32", QUIET)
    loaded = models.load("ViT-B-16", str(tmp_path / name), torch.device("cpu"))
    assert set(loaded.network.activation.values()) == {"quick_gelu"} and not loaded.notes


class TestARun:
    def changed(self, place: Path, here: Path, change: Callable[[dict[str, Any]], Any]) -> RunFolder:
        """A copy of RUN with another config.json."""
        shutil.copytree(place / "RUN", here / "RUN")
        run = RunFolder(here / "RUN")
        config = json.loads(run.config.read_text())
        change(config)
        run.config.write_text(json.dumps(config))
        return run

    def test_is_tested_as_the_network_it_was_trained_as(self, place: Path, tmp_path: Path) -> None:
        run = self.changed(place, tmp_path, lambda config: config["network"]["activation"].update(vision="gelu"))
        with pytest.raises(UserError, match="another network than ViT-B-16 is now: activation of vision gelu, here quick_gelu"):
            evalrun.run(run, str(place / "photographs"), Path("data"), "cpu", None, None, QUIET)
        run = self.changed(place, tmp_path / "2", lambda config: config.update(network=3))
        with pytest.raises(UserError, match="does not say which network was trained"):
            evalrun.run(run, str(place / "photographs"), Path("data"), "cpu", None, None, QUIET)

    def test_is_not_tested_on_other_weights(self, place: Path, tmp_path: Path) -> None:
        run = self.changed(place, tmp_path, lambda config: config.update(weights="0" * 16))
        with pytest.raises(UserError, match="began with other weights than ViT-B-16 with pretrained 'openai' has now"):
            evalrun.run(run, str(place / "photographs"), Path("data"), "cpu", None, None, QUIET)

    def test_of_an_earlier_version_says_what_is_assumed(
        self, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def older(config: dict[str, Any]) -> None:
            del config["network"], config["weights"], config["recipe"]["quick_gelu"]

        run = self.changed(place, tmp_path, older)
        evalrun.run(run, str(place / "photographs"), Path("data"), "cpu", None, None, Console(width=300))
        said = capsys.readouterr().out
        assert "of an earlier version, which kept no network: assumed is activation of text quick_gelu" in said

    def test_keeps_its_network_with_a_fully_trained_model(self, place: Path, tmp_path: Path) -> None:
        recipe = Recipe(model="ViT-B-16", pretrained="openai", method="full", shots=1, iterations=1, batch_size=4)
        trainer.run(trainer.Job(recipe, str(place / "photographs"), tmp_path / "full", device="cpu"), QUIET)
        loaded = models.load("ViT-B-16", str(tmp_path / "full" / "model.safetensors"), torch.device("cpu"))
        assert set(loaded.network.activation.values()) == {"quick_gelu"}
