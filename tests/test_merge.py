"""Merged checkpoints: the host's own library loads them, equal to the adapted model in fp32, and rounding is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import fastlora
from fastlora.checkpoint import merged
from fastlora.encoders import frozen_in
from fastlora.fewshot import evalrun, mergerun, models, trainer
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from models import TINY, features, inputs, randomise_adapters, tiny
from pictures import make_folder, tiny_clip


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny().to(dtype)
    fastlora.patch(model, **options)
    randomise_adapters(model, 0.02)
    return model


def relative(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> float:
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(got, want, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_open_clip_takes_the_file(tmp_path: Path, name: str) -> None:
    model = adapted(targets=("q", "v", "o", "fc1"))
    fastlora.add_adapter(model, "other")  # an inactive adapter is not in the file
    fastlora.set_adapter(model, "default")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fastlora.save(model, tmp_path / name, format="merged")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (tmp_path / "merge-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "merge-tiny.json")
    plain = open_clip.create_model("merge-tiny", pretrained=str(tmp_path / name)).eval()
    assert relative(features(plain, *inputs(model)), features(model, *inputs(model))) < 1e-5
    assert set(plain.state_dict()) == set(tiny().state_dict())
    fastlora.merge(model)  # what is merged is written as it is
    fastlora.save(model, tmp_path / "again.safetensors", format="merged")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[key], value) for key, value in plain.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_told(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(dtype)
    exact, updates = {}, {}
    for name, module in model.named_modules():
        if getattr(module, "adapted", False):
            updates[name] = module.delta()
            exact[name] = module.in_proj_weight.float() + updates[name]
    report = fastlora.merge(model)
    errors = {name: (model.get_submodule(name).in_proj_weight.float() - want) for name, want in exact.items()}
    assert report.modules == 6 and report.dtype == dtype
    assert report.largest == pytest.approx(max(float(e.abs().max()) for e in errors.values()))
    norm = [torch.stack([t.norm() for t in of.values()]).norm() for of in (errors, updates)]
    assert report.relative == pytest.approx(float(norm[0] / norm[1]), rel=1e-4) and report.relative > 1e-3
    assert f"rounding to {str(dtype)[6:]} costs" in str(report)
    assert fastlora.merge(adapted()).largest == 0.0
    # an fp32 model in a half-precision file: rounded once, from the sum
    model = adapted()
    told = merged.write(model, tmp_path / "half.safetensors", dtype)
    state = load_file(tmp_path / "half.safetensors")
    fastlora.merge(model)
    assert told.dtype == dtype and told.largest > 0
    assert all(torch.equal(state[key], value.to(dtype)) for key, value in model.state_dict().items() if key in state)


def test_a_double_base_is_summed_in_double() -> None:
    model = adapted(torch.float64)
    weight = model.transformer.resblocks[0].attn.in_proj_weight.clone()
    fastlora.merge(model)
    layer = model.transformer.resblocks[0].attn
    assert torch.equal(layer.in_proj_weight, weight + layer.delta())


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr("fastlora.checkpoint.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        fastlora.save(model, path, format="merged")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a few steps."""
    base = tmp_path_factory.mktemp("merge")
    model, data = tiny_clip(base / "tiny"), make_folder(base / "pictures", ["a", "b"], images=5)
    recipe = Recipe(model=model, pretrained=None, shots=2, iterations=3, batch_size=4, lr=1e-2)
    trainer.run(trainer.Job(recipe, str(data), base / "out", device="cpu"), Console(quiet=True))
    return RunFolder(base / "out")


def test_a_run_becomes_a_checkpoint(run: RunFolder, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as log:
        mergerun.run(run, tmp_path / "model.safetensors", "bf16", Console(file=log))
        mergerun.run(run, tmp_path / "exact.safetensors", "fp32", Console(file=log))
    said = (tmp_path / "log").read_text()
    assert "4 modules merged, summed in fp32; rounding to bfloat16 costs" in said and "no rounding" in said
    _, recipe = evalrun.finished(run)
    want, plain = (models.load(recipe.model, None, torch.device("cpu")).model for _ in range(2))
    evalrun.adapt(want, recipe, run)
    plain.load_state_dict(load_file(tmp_path / "exact.safetensors"))
    with torch.no_grad():
        assert relative(features(plain, *inputs(plain)), features(want, *inputs(plain))) < 1e-5
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_what_cannot_be_merged_is_told(run: RunFolder, tmp_path: Path) -> None:
    console = Console(quiet=True)
    with pytest.raises(UserError, match="is there already"):
        mergerun.run(run, run.adapter, "fp32", console)
    with pytest.raises(UserError, match="there is no folder"):
        mergerun.run(run, tmp_path / "no" / "model.safetensors", "fp32", console)
    with pytest.raises(UserError, match="not the folder of a run"):
        mergerun.run(RunFolder(tmp_path), tmp_path / "model.safetensors", "fp32", console)
    config = json.loads(run.config.read_text())
    config["recipe"]["method"] = "full"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="trained by full: there is no adapter"):
        mergerun.run(RunFolder(tmp_path), tmp_path / "model.safetensors", "fp32", console)


class TestStateDict:
    """A merged weight holds the update already: it must neither be lost nor counted twice."""

    def test_of_a_merged_model_is_for_plain_ones(self, tmp_path: Path) -> None:
        model = adapted()
        fastlora.merge(model)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        with pytest.raises(RuntimeError, match="was merged when its state_dict was taken, and the update would count twice"):
            adapted().load_state_dict(state)
        plain = tiny()
        plain.load_state_dict(state, strict=False)
        with torch.no_grad():
            assert relative(features(plain, *inputs(model)), features(model, *inputs(model))) < 1e-6
        fastlora.unmerge(model)
        adapted().load_state_dict(model.state_dict())

    def test_is_not_loaded_into_a_merged_model(self) -> None:
        model, other = adapted(), tiny(seed=3).state_dict()
        before = model.state_dict()["transformer.resblocks.0.attn.in_proj_weight"].clone()
        fastlora.merge(model)
        with pytest.raises(RuntimeError, match=r"is merged, and would lose its adapter: call fastlora\.unmerge"):
            model.load_state_dict(other, strict=False)
        fastlora.unmerge(model)
        assert torch.equal(model.state_dict()["transformer.resblocks.0.attn.in_proj_weight"], before)

    def test_hooks_of_the_host_are_left_alone(self) -> None:
        model = tiny()
        host = model.transformer.resblocks[0].attn
        fastlora.patch(model)
        assert not host._state_dict_hooks
        fastlora.unpatch(model)
        assert model.transformer.resblocks[0].attn is host and not host._state_dict_hooks


def test_casts_that_stand_in_for_the_weights_are_not_merged(tmp_path: Path) -> None:
    model = adapted()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with frozen_in(torch.bfloat16, model):
        for verb in (fastlora.merge, lambda m: fastlora.save(m, tmp_path / "m.safetensors", format="merged")):
            with pytest.raises(RuntimeError, match=r"casts inside fastlora\.encoders\.frozen_in"):
                verb(model)
    assert all(map(torch.equal, weights, model.parameters())) and not list(tmp_path.iterdir())
    fastlora.merge(model)
    with frozen_in(torch.bfloat16, model), pytest.raises(RuntimeError, match="casts inside"):
        fastlora.unpatch(model)
    fastlora.unmerge(model)
    assert all(map(torch.equal, weights, model.parameters()))
