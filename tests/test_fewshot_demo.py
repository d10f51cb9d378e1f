"""The demo's rivals: textbook LoRA is LoRA, costs are counted alike, and the demo runs from end to end."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastlora import LoRAConfig, lora_parameters, mini, patch
from fastlora.fewshot import demo
from fastlora.fewshot.compare import compare, textbook
from fastlora.fewshot.errors import UserError
from models import inputs, randomise_adapters, tiny
from pictures import TINY


def square(model: Any) -> Tensor:
    images, tokens = inputs(model)
    return model.encode_image(images).square().mean() + model.encode_text(tokens).square().mean()


def test_textbook_lora_computes_what_fastlora_computes() -> None:
    config = LoRAConfig(dropout=0.0, targets=("q", "v"))
    ours, naive = tiny(), textbook(tiny(), config)
    patch(ours, config)
    randomise_adapters(ours)
    by_path = dict(naive.named_modules())
    for path, module in ours.named_modules():
        if "lora_A" in module._parameters:
            for row, group in enumerate((0, 2)):
                by_path[path].lora_A.data[group] = module.lora_A.data[row]
                by_path[path].lora_B.data[group] = module.lora_B.data.chunk(2)[row]
    images, tokens = inputs(ours)
    assert torch.allclose(ours.encode_image(images), naive.encode_image(images), atol=1e-5)
    assert torch.allclose(ours.encode_text(tokens), naive.encode_text(tokens), atol=1e-5)
    assert not torch.allclose(ours.encode_image(images), tiny().encode_image(images), atol=1e-3)


def test_costs_are_of_three_methods_and_leave_the_model_alone() -> None:
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    costs = {cost.name: cost for cost in compare(model, LoRAConfig(), square, square, repeats=2)}
    assert list(costs) == ["fastlora", "textbook LoRA", "full fine-tuning"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    patch(model)
    assert costs["fastlora"].trainable == costs["textbook LoRA"].trainable == sum(p.numel() for p in lora_parameters(model))
    assert costs["fastlora"].saved_bytes < costs["textbook LoRA"].saved_bytes
    assert all(cost.seconds > 0 for cost in costs.values())


@pytest.fixture
def tiny_mini(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mini CLIP with random weights: what the demo does, in seconds, not what it reaches."""
    from open_clip import SimpleTokenizer
    from open_clip.model import CLIP

    torch.manual_seed(0)
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 77}}
    monkeypatch.setattr(mini, "load", lambda: (CLIP(**config).eval(), SimpleTokenizer()))


def test_demo_from_end_to_end(tiny_mini: None, tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=200)
    for _ in range(2):  # the second replaces the first
        metrics = demo.run(tmp_path / "demo", 5, 1, console)
    text = console.export_text()
    for piece in ("5 of the paper's 8000 steps", "zero-shot", "textbook LoRA", "full fine-tuning", "report.html", "0.01"):
        assert piece in text, piece
    assert metrics["test_images"] == 899 and len(metrics["compare"]) == 3
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text())["compare"] == metrics["compare"]


def test_a_demo_that_was_stopped_is_begun_anew(tiny_mini: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(job: Any, console: Console) -> None:
        (job.out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(demo, "train", stopped)
        demo.run(tmp_path / "demo", 5, 1, Console(quiet=True))
    assert demo.run(tmp_path / "demo", 2, 1, Console(quiet=True))["test_images"] == 899


def test_demo_never_takes_a_folder_that_holds_something_for_its_own(tiny_mini: None, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    demo.run(tmp_path, 2, 1, Console(quiet=True))
    with pytest.raises(UserError, match="another run"):
        demo.run(tmp_path, 2, 1, Console(quiet=True))
    assert (tmp_path / "photo.jpg").read_text() == "mine"


def test_demo_never_replaces_another_run(tiny_mini: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="another run"):
        demo.run(tmp_path, 5, 1, Console(quiet=True))
