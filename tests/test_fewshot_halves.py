"""Base-to-new and tests on other data sets: which classes each half holds, and numbers that agree with a plain run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fastlora.fewshot import evalrun, trainer
from fastlora.fewshot.datasets import Dataset, Item
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.halves import base_and_new, harmonic_mean
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from fastlora.fewshot.trainer import Job
from pictures import make_folder

QUIET = Console(quiet=True)
CLASSES = ("ant", "bee", "cat", "dog", "elk")


def items(labels: list[int]) -> tuple[Item, ...]:
    return tuple(Item(label, f"{label}-{i}", np.zeros((4, 4, 3), np.uint8)) for i, label in enumerate(labels))


class TestHalves:
    def test_first_half_is_rounded_up_and_labels_begin_at_zero(self) -> None:
        whole = Dataset("d", CLASSES, items([0, 1, 2, 3, 4, 4]), items([3]), items([4, 2, 0]))
        base, new = base_and_new(whole)
        assert (base.classes, new.classes) == (("ant", "bee", "cat"), ("dog", "elk"))
        assert [(i.label, i.name) for i in base.train] == [(0, "0-0"), (1, "1-1"), (2, "2-2")]
        assert [(i.label, i.name) for i in new.train] == [(0, "3-3"), (1, "4-4"), (1, "4-5")]
        assert [i.label for i in new.val] == [0] and base.val == ()
        assert base.test is not None and new.test is not None
        assert [i.name for i in base.test] == ["2-1", "0-2"] and [i.name for i in new.test] == ["4-0"]

    def test_without_a_test_split_there_is_none_in_the_halves(self) -> None:
        base, new = base_and_new(Dataset("d", CLASSES, items([0, 1, 2, 3, 4])))
        assert base.test is None and new.test is None

    def test_three_classes_are_too_few(self) -> None:
        with pytest.raises(UserError, match="needs at least 4 classes, two in each half: d has 3"):
            base_and_new(Dataset("d", CLASSES[:3], items([0, 1, 2])))

    def test_harmonic_mean(self) -> None:
        assert harmonic_mean(80, 60) == pytest.approx(2 / (1 / 80 + 1 / 60))
        assert harmonic_mean(0, 0) == 0 == harmonic_mean(50, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "animals", CLASSES, images=6)


def recipe(model: str, **changes: Any) -> Recipe:
    return Recipe(**{"model": model, "pretrained": None, "shots": 2, "iterations": 10, "batch_size": 6, "lr": 1e-2, **changes})


class TestRuns:
    def test_base_to_new_and_another_set(self, model: str, folder: Path, tmp_path: Path) -> None:
        other = str(make_folder(tmp_path / "other", ["x", "y"], 3))
        out = tmp_path / "r"
        job = Job(recipe(model, base_to_new=True), str(folder), out, device="cpu", also=(other,))
        metrics = trainer.run(job, QUIET)
        halves, (also,) = metrics["base_to_new"], metrics["also"]
        assert [row["class"] for row in metrics["per_class"]] == list(CLASSES[:3])
        assert metrics["train_images"] == 6 and metrics["test_images"] == 12
        assert (halves["base_classes"], halves["new_classes"], halves["new_test_images"]) == (3, 2, 12)
        assert halves["base"] == metrics["accuracy"]
        assert halves["zero_shot"]["base"] == metrics["zero_shot_accuracy"]
        assert halves["harmonic_mean"] == pytest.approx(harmonic_mean(halves["base"], halves["new"]), abs=1e-3)
        trained = json.loads((out / "split.json").read_text())["train"]
        assert {name.split("/")[0] for name in trained} == set(CLASSES[:3])
        # the same by `fastlora eval`, which knows nothing of this run's other tests
        again = evalrun.run(RunFolder(out), other, Path("data"), "cpu", None, None, QUIET)
        assert (again["accuracy"], again["zero_shot_accuracy"]) == (also["accuracy"], also["zero_shot"])
        assert also["change"] == pytest.approx(also["accuracy"] - also["zero_shot"], abs=1e-3)
        assert (also["classes"], also["test_images"]) == (2, 6)

    def test_a_sweeps_row_holds_the_halves(self, model: str, folder: Path, tmp_path: Path) -> None:
        from fastlora.fewshot.sweep.grid import Run
        from fastlora.fewshot.sweep.results import row_of

        wanted = Run(str(folder), recipe(model, base_to_new=True, method="zero-shot"), "base")
        metrics = trainer.run(Job(wanted.recipe, wanted.data, tmp_path / wanted.name, device="cpu", brief=True), QUIET)
        row = row_of(wanted, tmp_path)
        assert row is not None
        assert row["base_to_new_harmonic_mean"] == metrics["base_to_new"]["harmonic_mean"]
        assert (
            row["base_to_new_new"] == metrics["base_to_new"]["new"] and row["calibration_ece"] == metrics["calibration"]["ece"]
        )

    def test_zero_shot_on_halves_changes_nothing(self, model: str, folder: Path, tmp_path: Path) -> None:
        job = Job(recipe(model, base_to_new=True, method="zero-shot"), str(folder), tmp_path / "r", device="cpu")
        halves = trainer.run(job, QUIET)["base_to_new"]
        assert {name: halves[name] for name in halves["zero_shot"]} == halves["zero_shot"]

    def test_what_a_probe_cannot_do_is_told_before_anything_is_loaded(self) -> None:
        with pytest.raises(ValueError, match="base_to_new: linear-probe tells only the classes it was trained on"):
            Recipe(method="linear-probe", base_to_new=True)
        with pytest.raises(UserError, match="--also: linear-probe tells only"):
            Job(Recipe(method="linear-probe"), "digits", Path("r"), also=("caltech101",))

    @pytest.mark.parametrize("also", [("digits",), ("a", "b", "a")])
    def test_a_set_named_twice(self, also: tuple[str, ...]) -> None:
        with pytest.raises(UserError, match="is tested anyway: name other data sets, each once"):
            Job(Recipe(), "digits", Path("r"), also=also)
