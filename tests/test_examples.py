"""The examples in other people's loops run as they stand, at a tiny size, and leave an adapter that was trained."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

import fastlora
from fastlora import mini
from fastlora.record import lora_layers

LOOPS = Path(__file__).resolve().parent.parent / "examples" / "loops"


@pytest.mark.filterwarnings("ignore")  # of Lightning, Accelerate and the Trainer about themselves and this machine
@pytest.mark.parametrize("name", sorted(p.stem for p in LOOPS.glob("*.py") if p.stem != "digits"))
def test_a_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "adapter.safetensors"
    monkeypatch.setattr(sys, "argv", [name, "--steps", "2", "--batch", "2", "--out", str(out)])
    monkeypatch.setattr(sys, "path", [str(LOOPS), *sys.path])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(LOOPS / f"{name}.py"), run_name="__main__")
    model, _ = mini.load()
    fastlora.load(model, out)
    layers = [layer for _, layer in lora_layers(model)]
    assert layers and all(layer.adapters()[1].abs().max() > 0 for layer in layers)
    assert not torch.is_autocast_enabled("cpu")
