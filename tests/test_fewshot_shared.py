"""Runs that share a model and decoded images give what each gives alone, and put the model back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fastlora.fewshot import digests, images, models, trainer
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.shared import Shared
from fastlora.fewshot.trainer import Job
from pictures import make_folder

QUIET = Console(quiet=True)
CHANGES = ({"method": "lora"}, {"method": "full"}, {"lr": 1e30}, {"precision": "bf16"}, {"precision": "bf16", "lr": 1e30})
METHODS = ("lora", "full", "lora", "linear-probe")


def run(model: str, data: Path, out: Path, shared: Shared, brief: bool = True, **changes: Any) -> dict[str, Any]:
    recipe = Recipe(**{"model": model, "shots": 2, "iterations": 6, "batch_size": 4, "lr": 1e-2, "pretrained": None, **changes})
    return trainer.run(Job(recipe, str(data), out, device="cpu", brief=brief), QUIET, shared)


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    """Everything that must not depend on what ran before: no times, no peaks of a process."""
    metrics = json.loads(json.dumps(metrics))
    for name in ("seconds", "steps_per_second"):
        metrics.get("training", {}).pop(name, None)
    del metrics["timings"], metrics["memory"]
    return metrics


def state(model: nn.Module) -> dict[str, Any]:
    kinds = {name: type(module) for name, module in model.named_modules()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return {"kinds": kinds, "flags": flags, "mode": model.training, "names": sorted(vars(model))}


def test_a_run_after_others_is_the_run_alone(model: str, folder: Path, tmp_path: Path) -> None:
    broken = make_folder(tmp_path / "d", ["red", "green", "blue"], images=8)
    for number in (0, 3, 5):  # a draw must not depend on which broken files other draws came upon
        (broken / "red" / f"{number}.png").write_text("broken")
    shared = Shared()
    for number, method in enumerate(METHODS):
        for seed in (1, 2):
            out = tmp_path / f"{number}-{seed}"
            together = run(model, broken, out / "together", shared, method=method, seed=seed)
            alone = run(model, broken, out / "alone", Shared(), method=method, seed=seed)
            assert without_times(together) == without_times(alone)
            for name in ("split.json", "predictions.csv"):
                assert (out / "together" / name).read_bytes() == (out / "alone" / name).read_bytes()


def test_the_model_comes_back_as_it_was(model: str, folder: Path, tmp_path: Path) -> None:
    shared = Shared()
    with shared.model(Recipe(model=model, pretrained=None), torch.device("cpu")) as loaded:
        host = loaded.model
    before = state(host), {name: tensor.clone() for name, tensor in host.state_dict().items()}
    for number, changes in enumerate(CHANGES):
        if "lr" in changes:
            with pytest.raises(UserError, match="not a number"):  # a run that fails on the way gives it back too
                run(model, folder, tmp_path / str(number), shared, **changes)
        else:
            run(model, folder, tmp_path / str(number), shared, **changes)
        with shared.model(Recipe(model=model, pretrained=None), torch.device("cpu")) as loaded:
            assert loaded.model is host
            assert state(host) == before[0]
            assert all(torch.equal(tensor, before[1][name]) for name, tensor in host.state_dict().items())


def test_nothing_is_loaded_or_decoded_twice(model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, opened, hashed = [], [], []
    load, open_rgb, digest = models.load, images.open_rgb, digests._digest
    monkeypatch.setattr(models, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    monkeypatch.setattr(images, "open_rgb", lambda item: opened.append(item.name) or open_rgb(item))
    monkeypatch.setattr(digests, "_digest", lambda item: hashed.append(item.name) or digest(item))
    data = tmp_path / "d"
    make_folder(data / "train", ["a", "b"], images=4)
    make_folder(data / "test", ["a", "b"], images=3)
    shared = Shared()
    for number, (shots, seed) in enumerate([(1, 1), (4, 1), (4, 2), (1, 2)]):
        run(model, data, tmp_path / str(number), shared, shots=shots, seed=seed, method="full")
    assert len(loaded) == 1
    assert len(opened) == len(set(opened)) == 8 + 6
    assert len(hashed) == len(set(hashed)) == 8 + 6


def test_a_brief_run_leaves_what_a_row_needs(model: str, folder: Path, tmp_path: Path) -> None:
    run(model, folder, tmp_path / "full", Shared(), method="full")
    run(model, folder, tmp_path / "lora", Shared())
    few = {"config.json", "split.json", "metrics.json", "history.csv", "predictions.csv"}
    assert {path.name for path in (tmp_path / "full").iterdir()} == few
    assert {path.name for path in (tmp_path / "lora").iterdir()} == few | {"adapter.safetensors"}
