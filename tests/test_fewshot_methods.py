"""Other recipes for comparison: each on clouds of features where the right answer is known, and in whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fastlora.fewshot import evalrun, trainer
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.evaluate import encode_prompts
from fastlora.fewshot.methods import coop, probe, tip_adapter
from fastlora.fewshot.methods.frozen import Frozen
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from fastlora.fewshot.shared import Shared
from fastlora.fewshot.trainer import Job
from models import tiny
from pictures import make_folder

QUIET = Console(quiet=True)
NONE = (torch.empty(0, 16), torch.empty(0, dtype=torch.int64))
Cloud = tuple[Tensor, Tensor]


def clouds(val: int, train: int = 4, text: Tensor | None = None, test: int = 60) -> Frozen:
    """Three classes of unit features around random centres; class words point anywhere unless `text` is given."""
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(3, 16, generator=generator), dim=1)

    def cloud(each: int) -> Cloud:
        labels = torch.arange(3).repeat_interleave(each)
        return F.normalize(centres[labels] + 0.15 * torch.randn(3 * each, 16, generator=generator), dim=1), labels

    shots, words = cloud(train), F.normalize(torch.randn(3, 16, generator=generator), dim=1)

    def views(number: int) -> Tensor:
        noise = 0.1 * torch.randn(number, len(shots[1]), 16, generator=generator)
        return F.normalize(shots[0] + noise, dim=-1)

    given = cloud(val) if val else NONE
    return Frozen(("a", "b", "c"), shots, given, cloud(test) if test else NONE, words if text is None else text, 10.0, views, 1)


class TestProbe:
    @pytest.mark.parametrize(("val", "train"), [(0, 8), (4, 8), (0, 1)], ids=["folds", "validation", "one shot"])
    def test_separates_what_can_be_separated(self, val: int, train: int) -> None:
        result, chosen = probe.fit(clouds(val, train))
        assert result.accuracy > 90 and chosen["probe_c"] > 0

    def test_no_test_images(self) -> None:
        assert len(probe.fit(clouds(0, test=0))[0].labels) == 0


class TestTipAdapter:
    def test_logits_are_the_formula(self) -> None:
        given = clouds(0)
        keys, labels = given.train
        values = F.one_hot(labels, 3).float()
        ours = tip_adapter.logits(given.test[0], given, keys, values, alpha=2.0, beta=3.0)
        for i in (0, 77):
            f = given.test[0][i]
            expected = 10 * given.text @ f
            for key, label in zip(keys, labels, strict=True):
                expected[label] += 2 * torch.exp(-3 * (1 - f @ key))
            torch.testing.assert_close(ours[i], expected)

    def test_the_cache_overrules_words_that_mean_nothing_where_validation_says_so(self) -> None:
        without, chosen = tip_adapter.fit(clouds(0))
        assert chosen == {"tip_alpha": tip_adapter.ALPHA, "tip_beta": tip_adapter.BETA}
        searched, found = tip_adapter.fit(clouds(4))
        assert searched.accuracy > 90 > without.accuracy and found["tip_alpha"] > tip_adapter.ALPHA

    def test_the_search_takes_the_best(self) -> None:
        given = clouds(8)
        values = F.one_hot(given.train[1], 3).float()
        alpha, beta = tip_adapter.search(given, given.train[0], values)

        def accuracy(a: float, b: float) -> float:
            guess = tip_adapter.logits(given.val[0], given, given.train[0], values, a, b).argmax(-1)
            return float((guess == given.val[1]).double().mean())

        assert accuracy(alpha, beta) == max(accuracy(a, b) for a in tip_adapter.ALPHAS for b in tip_adapter.BETAS)

    def test_training_helps_the_shots(self) -> None:
        given = clouds(0)
        values = F.one_hot(given.train[1], 3).float()
        keys = F.normalize(given.views(10).mean(0), dim=-1)

        def loss(result: Any) -> float:
            return float(-result.truth.log().mean())

        from fastlora.fewshot.result import Result

        before = Result.of(given.classes, given.test[1], tip_adapter.logits(given.test[0], given, keys, values, 1.0, 5.5))
        assert loss(tip_adapter.fit(given)[0]) < loss(before)


class TestCoOp:
    def prompts(self) -> Tensor:
        tokens = torch.zeros(2, 1, 24, dtype=torch.int64)
        tokens[0, 0, :4], tokens[1, 0, :5] = torch.tensor([62, 5, 6, 63]), torch.tensor([62, 7, 8, 9, 63])
        return tokens

    def test_the_context_stands_between_start_and_name(self) -> None:
        host = tiny(text_cfg={"context_length": 24})
        before = [p.detach().clone() for p in host.parameters()]
        torch.manual_seed(0)
        embedding, (placed,), undo = coop.place(host, [self.prompts()])
        slots = placed[0, 0, 1 : 1 + coop.LENGTH]
        assert (
            placed[0, 0, 0] == 62
            and placed[0, 0, 17:20].tolist() == [5, 6, 63]
            and placed[1, 0, 17:21].tolist() == [7, 8, 9, 63]
        )
        assert len(set(slots.tolist())) == 16 and not set(slots.tolist()) & {0, 5, 6, 7, 8, 9, 62, 63}
        assert torch.equal(embedding(slots), embedding.context) and torch.equal(embedding(torch.tensor(5)), embedding.weight[5])
        # the host's own text tower, whole, reads the same as the packed one
        with torch.no_grad():
            packed, whole = encode_prompts(host, placed), F.normalize(host.encode_text(placed[:, 0]), dim=-1)
        torch.testing.assert_close(packed, whole, rtol=1e-4, atol=1e-5)
        encode_prompts(host, placed).sum().backward()
        assert embedding.context.grad is not None and embedding.context.grad.abs().sum() > 0
        assert [n for n, p in host.named_parameters() if p.requires_grad] == ["token_embedding.context"]
        undo()
        assert all(torch.equal(a, b) for a, b in zip(host.parameters(), before, strict=True))

    def test_what_does_not_fit_is_told(self) -> None:
        long = self.prompts()
        long[0, 0, :12] = 3
        with pytest.raises(UserError, match="takes more than the 8 tokens that 16 context vectors leave"):
            coop.place(tiny(text_cfg={"context_length": 24}), [long])
        with pytest.raises(UserError, match="needs an open_clip model"):
            coop.place(torch.nn.Linear(2, 2), [self.prompts()])

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        embedding, _, _ = coop.place(tiny(text_cfg={"context_length": 24}), [self.prompts()])
        (tmp_path / "c").write_bytes(b"no context")
        with pytest.raises(UserError, match="is not a context that coop saved"):
            coop.load(embedding, tmp_path / "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for role in ("train", "val", "test"):
        make_folder(root / role, ("red", "green", "blue"), images=4)
    return root


def recipe(model: str, **changes: Any) -> Recipe:
    small = {"shots": 2, "iterations": 40, "batch_size": 6, "pretrained": None}
    return Recipe(**{"model": model, **small, **changes})


class TestRuns:
    def test_tip_adapter(self, model: str, folder: Path, tmp_path: Path) -> None:
        job = Job(recipe(model, method="tip-adapter-f"), str(folder), tmp_path / "r", device="cpu")
        metrics = trainer.run(job, QUIET)
        assert metrics["accuracy"] > metrics["zero_shot_accuracy"] + 20 and metrics["tip_alpha"] > 0
        assert "training" not in metrics and not (tmp_path / "r" / "history.csv").exists()
        with pytest.raises(UserError, match="by tip-adapter-f, which leaves no model"):
            evalrun.run(RunFolder(tmp_path / "r"), str(folder), Path("data"), "cpu", None, None, QUIET)

    def test_coop_and_its_test_again(self, model: str, folder: Path, tmp_path: Path) -> None:
        """The context alone is trained, a model that is lent comes back without it, and other classes can be tested."""
        other = str(make_folder(tmp_path / "other", ("x", "y"), 3))
        shared, out = Shared(), tmp_path / "r"
        job = Job(recipe(model, method="coop", lr=0.05), str(folder), out, device="cpu", also=(other,))
        metrics = trainer.run(job, QUIET, shared)
        context = load_file(out / "context.safetensors")["context"]
        assert metrics["training"]["trainable_parameters"] == context.numel() == 16 * 16
        losses = [float(line.split(",")[1]) for line in (out / "history.csv").read_text().splitlines()[1:]]
        assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
        again = evalrun.run(RunFolder(out), other, Path("data"), "cpu", None, None, QUIET)
        assert again["accuracy"] == metrics["also"][0]["accuracy"]
        plain = trainer.run(Job(recipe(model, method="zero-shot"), str(folder), tmp_path / "z", device="cpu"), QUIET, shared)
        assert plain["accuracy"] == metrics["zero_shot_accuracy"]
