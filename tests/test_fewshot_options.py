"""The options beyond the paper's recipe: each does what its formula says, and a run without them is the paper's."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file

import fastlora
from fastlora.config import LoRAConfig
from fastlora.fewshot import evalrun, trainer
from fastlora.fewshot.errors import Interrupted
from fastlora.fewshot.evaluate import class_features, encode_images, encode_prompts
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.models import trained_state
from fastlora.fewshot.objective import ZeroShotTerm, frozen_twin
from fastlora.fewshot.optimizer import Average, parameter_groups
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from fastlora.fewshot.trainer import Job
from models import tiny

QUIET = Console(quiet=True)
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.", "{}")


def recipe(model: str, **changes: Any) -> Recipe:
    small = {"shots": 2, "iterations": 12, "batch_size": 4, "lr": 1e-2, "pretrained": None}
    return Recipe(**{"model": model, **small, **changes})


def run(model: str, data: Path, out: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return trainer.run(Job(recipe(model, **changes), str(data), out, device="cpu", resume=resume), QUIET)


def losses(out: Path) -> list[float]:
    with open(out / "history.csv", newline="") as file:
        return [float(row[1]) for row in list(csv.reader(file))[1:]]


@pytest.fixture(scope="module")
def plain(model: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "r"
    run(model, folder, out, lora=LoRAConfig(dropout=0.0))
    return out


class TestZeroShotTerm:
    def test_is_the_formula(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z, z0 = (5 * torch.randn(6, 4, generator=generator) for _ in range(2))
        term = ZeroShotTerm(torch.nn.Identity(), torch.empty(0), weight=0.3, temperature=2.0)
        p0, p = (z0 / 2).softmax(-1), (z / 2).softmax(-1)
        expected = 0.3 * 4 * (p0 * (p0.log() - p.log())).sum(-1)
        torch.testing.assert_close(term(z, (z0 / 2).log_softmax(-1)), expected)

    @pytest.mark.parametrize("share", [True, False])
    def test_a_twin_stays_as_the_model_was(self, share: bool) -> None:
        host = tiny()
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            before = encode_images(host, images)
            twin = frozen_twin(host, share)
            assert all((a is b) == share for a, b in zip(host.parameters(), twin.parameters(), strict=True))
            fastlora.patch(host)
            for name, parameter in trained_state(host).items():
                parameter.normal_() if name.endswith("lora_B") else None
            assert torch.equal(encode_images(twin, images), before)
            assert not torch.allclose(encode_images(host, images), before, atol=1e-3)

    def test_it_holds_the_adapted_model_at_the_zero_shot_one(
        self, model: str, folder: Path, plain: Path, tmp_path: Path
    ) -> None:
        run(model, folder, tmp_path / "r", lora=LoRAConfig(dropout=0.0), kl_weight=100.0, kl_temperature=1.0)
        ours, theirs = losses(tmp_path / "r"), losses(plain)
        # adapters begin at zero: the first loss is the cross-entropy alone, the twin's logits are the model's own
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and ours[1] != theirs[1]
        free, held = (load_file(out / "adapter.safetensors") for out in (plain, tmp_path / "r"))
        size = {id(t): sum(float(v.norm()) for n, v in t.items() if "lora_B" in n) for t in (free, held)}
        assert size[id(held)] < 0.8 * size[id(free)]

    def test_with_full_fine_tuning_the_twin_is_a_copy(self, model: str, folder: Path, tmp_path: Path) -> None:
        run(model, folder, tmp_path / "a", method="full", kl_weight=0.0, lr=1e-3)
        run(model, folder, tmp_path / "b", method="full", kl_weight=5.0, lr=1e-3)
        # nothing is lost yet, but the two round differently: 5 times logits of size 100, in fp32
        rounding = 5.0 * 100 * torch.finfo(torch.float32).eps
        assert losses(tmp_path / "a")[0] == pytest.approx(losses(tmp_path / "b")[0], rel=0, abs=rounding)
        assert losses(tmp_path / "a")[1] != losses(tmp_path / "b")[1]


class TestTemplates:
    def test_features_are_averaged_at_length_one(self) -> None:
        features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        mean = class_features(features, 3)
        for i in range(3):
            expected = (F.normalize(features[2 * i], dim=0) + F.normalize(features[2 * i + 1], dim=0)) / 2
            torch.testing.assert_close(mean[i], expected / expected.norm())
        assert torch.equal(class_features(features, 6), F.normalize(features, dim=-1))

    def test_tokens_go_class_by_class(self) -> None:
        from fastlora.fewshot.images import Framing
        from fastlora.fewshot.models import LoadedModel

        loaded = LoadedModel(None, lambda texts: torch.tensor([[len(t)] for t in texts]), Framing(8), (), ())
        assert loaded.tokenise(("{}", "a {}"), ("x", "xyz")).tolist() == [[[1], [3]], [[3], [5]]]

    def test_a_run_with_several_and_its_test_again(self, model: str, folder: Path, plain: Path, tmp_path: Path) -> None:
        metrics = run(model, folder, tmp_path / "r", template=TEMPLATES)
        assert metrics["resolved"]["template"] == TEMPLATES
        assert losses(tmp_path / "r")[0] != losses(plain)[0]
        again = evalrun.run(RunFolder(tmp_path / "r"), str(folder), Path("data"), "cpu", None, None, QUIET)
        assert again["accuracy"] == metrics["accuracy"] and again["resolved"]["template"] == TEMPLATES
        assert "3 templates, averaged" in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")

    def test_the_loss_and_the_test_average_alike(self) -> None:
        """The loss of a step without dropout is the cross-entropy that evaluation's own class features give."""
        from fastlora.fewshot.distributed import ALONE
        from fastlora.fewshot.evaluate import class_logits
        from fastlora.fewshot.objective import Objective

        host = tiny()
        fastlora.patch(host, dropout=0.0)
        tokens = torch.randint(1, 40, (3, 2, 16), generator=torch.Generator().manual_seed(2))
        tokens[..., -1] = int(tokens.max()) + 1
        text = class_features(Objective(host, tokens, None, ALONE)._prompts(torch.zeros((), dtype=torch.int64)), 3)
        torch.testing.assert_close(text, encode_prompts(host, tokens))
        assert class_logits(host, text, text).shape == (3, 3)


class TestRates:
    def test_groups(self) -> None:
        host = tiny()
        fastlora.patch(host)
        names = {id(p): name for name, p in trained_state(host).items()}
        assert [(len(g["params"]), g["ratio"]) for g in parameter_groups(host, Recipe())] == [(len(names), 1.0)]
        slow, fast = parameter_groups(host, Recipe(lr_ratio=16.0))
        assert all(names[id(p)].endswith("lora_A") for p in slow["params"]) and slow["ratio"] == 1
        assert all(names[id(p)].endswith("lora_B") for p in fast["params"]) and fast["ratio"] == 16
        assert len(slow["params"]) + len(fast["params"]) == len(names)

    def test_b_steps_further_by_the_ratio(self, model: str, folder: Path, tmp_path: Path) -> None:
        """AdamW's first step from zero is the rate, whatever the gradient's size: B begins at zero."""
        sizes = {}
        for ratio in (1.0, 4.0):
            out = tmp_path / str(ratio)
            run(model, folder, out, iterations=1, lr_ratio=ratio, lora=LoRAConfig(dropout=0.0))
            sizes[ratio] = {n: t for n, t in load_file(out / "adapter.safetensors").items() if "lora_B" in n}
        for name, b in sizes[1.0].items():
            torch.testing.assert_close(sizes[4.0][name], 4 * b, rtol=1e-5, atol=1e-9)
        assert any(b.abs().max() > 5e-3 for b in sizes[1.0].values())


class TestAverage:
    def test_is_the_mean(self) -> None:
        weight = torch.zeros(3)
        average = Average([weight], share=4 / 6, steps=6)
        for step in range(1, 7):
            weight.fill_(float(step))
            average.update(torch.tensor([step - 1]))
        average.apply()
        torch.testing.assert_close(weight, torch.full((3,), (3 + 4 + 5 + 6) / 4))

    def test_of_a_run_and_after_a_stop(self, model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        weights: list[dict[str, torch.Tensor]] = []
        train_step = Loop.train_step
        stop_at = [0]

        def step(loop: Loop) -> None:
            train_step(loop)
            weights.append({name: p.detach().clone() for name, p in trained_state(loop.model).items()})
            if loop.step == stop_at[0]:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Loop, "train_step", step)
        run(model, folder, tmp_path / "whole", average=0.5)
        saved = load_file(tmp_path / "whole" / "adapter.safetensors")
        assert len(weights) == 12
        means = [torch.stack([w[name] for w in weights[6:]]).mean(0) for name in weights[0]]
        for tensor in saved.values():
            assert any(tensor.shape == mean.shape and torch.allclose(tensor, mean, atol=1e-6) for mean in means)
        for stop_at[0] in (9, 12):
            out = tmp_path / str(stop_at[0])
            with pytest.raises(Interrupted):
                run(model, folder, out, average=0.5)
            stop_at[0] = 0
            run(model, folder, out, average=0.5, resume=True)
            again = load_file(out / "adapter.safetensors")
            assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_the_command_line_takes_them(model: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastlora import cli
    from pictures import train_arguments

    ranks = ("--rank-pattern", "0=0,visual.*=3")
    more = (*ranks, "--kl-weight", "0.1", "--kl-temperature", "4", "--lr-ratio", "2", "--average", "0.5")
    both = ("--template", "a {}.", "--template", "the {}.")
    monkeypatch.setattr("sys.argv", ["fastlora", *train_arguments(folder, tmp_path / "r", model, *more, *both)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    values = json.loads((tmp_path / "r" / "config.json").read_text())["recipe"]
    assert {k: values[k] for k in ("kl_weight", "kl_temperature", "lr_ratio", "average", "template")} == {
        "kl_weight": 0.1, "kl_temperature": 4.0, "lr_ratio": 2.0, "average": 0.5, "template": ["a {}.", "the {}."]
    }  # fmt: skip
    assert values["lora"]["rank_pattern"] == [[0, 0], ["visual.*", 3]]
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / "r" / "adapter.safetensors").items() if "lora_A" in name}
    assert {("visual" in name, shape[-2]) for name, shape in shapes.items()} == {(True, 3), (False, 2)}
    assert not any("resblocks.0." in name for name in shapes)


def test_share_prefix_changes_masks_only(model: str, folder: Path, tmp_path: Path) -> None:
    """Exact without dropout; with it the prompts share the masks of what they share."""
    for dropout, same in ((0.0, True), (0.25, False)):
        lora = LoRAConfig(dropout=dropout)
        plain, shared = tmp_path / f"plain {dropout}", tmp_path / f"shared {dropout}"
        run(model, folder, plain, lora=lora)
        run(model, folder, shared, lora=lora, share_prefix=True)
        assert (losses(shared) == pytest.approx(losses(plain), rel=1e-4)) == same
