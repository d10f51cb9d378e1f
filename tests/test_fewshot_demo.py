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
from fastlora.fewshot.lock import Busy
from fastlora.fewshot.recipe import Recipe
from models import inputs, randomise_adapters, tiny
from owning import elsewhere
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

    torch.manual_seed(0)
    config = {**TINY, "text_cfg": {**TINY["text_cfg"], "context_length": 77}}
    monkeypatch.setattr(mini, "architecture", lambda: config)
    monkeypatch.setattr(mini, "load", lambda: (mini.build(), SimpleTokenizer()))


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
        (job.out / "config.json").write_text(json.dumps({"recipe": job.recipe.to_dict()}))
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


@pytest.fixture
def half_a_demo(tmp_path: Path) -> Path:
    """What a demo that was stopped left: its marker, config and log, as its process would write them."""
    out = tmp_path / "demo"
    (out / "log").mkdir(parents=True)
    said = {"made by": demo.MADE_BY, "host": "here", "process": 7}
    (out / "demo.json").write_text(json.dumps(said))
    (out / "config.json").write_text(json.dumps({"recipe": Recipe().to_dict()}))
    (out / "log" / "events.out.tfevents.1700000000.here.7.0").write_text("")
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "said",
    ['{"what": "the settings of my own web demo"}', "[]", "no JSON", '{"iterations": 300}', '{"made by": "somebody"}'],
    ids=["settings", "list", "text", "iterations", "somebody"],
)
@pytest.mark.parametrize("iterations", [0, 2])
def test_a_file_called_demo_json_makes_no_demo(tiny_mini: None, tmp_path: Path, said: str, iterations: int) -> None:
    (tmp_path / "demo.json").write_text(said)
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "thesis.tex").write_text("three years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"iterations must be|holds .*\(report.html\)"):
        demo.run(tmp_path, iterations, 1, Console(quiet=True))
    assert contents(tmp_path) == before


def test_arguments_are_checked_before_the_last_demo_goes(half_a_demo: Path) -> None:
    before = contents(half_a_demo)
    with pytest.raises(UserError, match="iterations must be"):
        demo.run(half_a_demo, 0, 1, Console(quiet=True))
    assert contents(half_a_demo) == before


def test_what_the_demo_did_not_make_outlives_it(tiny_mini: None, half_a_demo: Path) -> None:
    (half_a_demo / "notes.txt").write_text("mine")
    (half_a_demo / ".notes.tmp").write_text("mine too")
    demo.run(half_a_demo, 2, 1, Console(quiet=True))
    after = contents(half_a_demo)
    assert after["notes.txt"] == b"mine" and after[".notes.tmp"] == b"mine too"
    assert "log/events.out.tfevents.1700000000.here.7.0" not in after and ".lock" not in after
    assert json.loads(after["metrics.json"])["test_images"] == 899
    demo.run(half_a_demo, 2, 1, Console(quiet=True))  # and it is still a demo


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("log/events.out.tfevents.1700000000.there.8.0", "did not make"),
        ("log/notes.txt", "did not make"),
        ("config.json", "is not the config of a run"),
    ],
)
def test_a_demo_among_files_of_others_is_refused_whole(half_a_demo: Path, name: str, says: str) -> None:
    (half_a_demo / name).write_text("mine")
    before = contents(half_a_demo)
    with pytest.raises(UserError, match=says):
        demo.run(half_a_demo, 2, 1, Console(quiet=True))
    assert contents(half_a_demo) == before


def test_a_demo_at_work_is_not_replaced(half_a_demo: Path) -> None:
    with elsewhere(half_a_demo):
        before = contents(half_a_demo)
        with pytest.raises(Busy, match="another process is at work"):
            demo.run(half_a_demo, 2, 1, Console(quiet=True))
        assert contents(half_a_demo) == before
