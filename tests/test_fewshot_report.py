"""Results and report.html: numbers that agree with a plain count, one file that needs nothing else."""

from __future__ import annotations

import csv
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlora.fewshot import report, summary
from fastlora.fewshot.datasets import Item
from fastlora.fewshot.evaluate import Result, probe
from fastlora.fewshot.recipe import Recipe
from pictures import photo


def result(classes: int = 4, images: int = 200, seed: int = 0) -> Result:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    wrong = torch.rand(images, generator=generator) < 0.3
    predicted = torch.where(wrong, torch.randint(0, classes, (images,), generator=generator), labels)
    names = tuple(f"<class> & {i}" for i in range(classes))
    return Result(names, labels, predicted, torch.rand(images, generator=generator))


class TestResult:
    def test_counts(self) -> None:
        from sklearn.metrics import accuracy_score, confusion_matrix

        r = result()
        assert r.accuracy == pytest.approx(100 * accuracy_score(r.labels, r.predicted))
        assert np.array_equal(r.confusion().numpy(), confusion_matrix(r.labels, r.predicted, labels=range(4)))
        for i, (_, images, accuracy) in enumerate(r.per_class()):
            of_class = r.labels == i
            assert images == int(of_class.sum())
            assert accuracy == pytest.approx(100 * float((r.predicted[of_class] == i).double().mean()))

    def test_most_confused_is_in_order_and_without_the_right_ones(self) -> None:
        rows = result().most_confused(5)
        assert len(rows) == 5 and all(true != guess for true, guess, _ in rows)
        assert [count for _, _, count in rows] == sorted((count for _, _, count in rows), reverse=True)

    def test_a_class_without_images_has_no_accuracy(self) -> None:
        labels = torch.tensor([0, 0])
        rows = Result(("a", "b"), labels, labels, torch.ones(2)).per_class()
        assert rows == [("a", 2, 100.0), ("b", 0, None)]

    def test_csv(self, tmp_path: Path) -> None:
        r = result(images=5)
        r.write_csv(tmp_path / "p.csv", [f"é {i}.png" for i in range(5)])
        with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["predicted"] for row in rows] == [r.classes[i] for i in r.predicted]
        assert rows[3]["image"] == "é 3.png"


def test_probe_separates_what_can_be_separated() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=1)

    def cloud(each: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(3).repeat_interleave(each)
        return torch.nn.functional.normalize(
            centres[labels] + 0.1 * torch.randn(3 * each, 16, generator=generator), dim=1
        ), labels

    none = (torch.empty(0, 16), torch.empty(0, dtype=torch.int64))
    for val in (none, cloud(4)):
        predictions, c = probe(("a", "b", "c"), cloud(8), val, cloud(50), seed=1)
        assert predictions.accuracy > 95 and c > 0
    assert len(probe(("a", "b", "c"), cloud(1), none, none, seed=1)[0].labels) == 0


class Checker(HTMLParser):
    """Tags in balance; no link, script or picture that is not inside the file."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe"), tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith(("data:", "#")), value
                self.pictures += tag == "img"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def written(tmp_path: Path, classes: int, **config: Any) -> str:
    before, after = result(classes, seed=1), result(classes, seed=2)
    before = Result(before.classes, after.labels, before.predicted, before.confidence)
    test = [Item(int(label), f"{i}.png", photo(20, 20, i)) for i, label in enumerate(after.labels)]
    recipe = Recipe(**config)
    history = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    metrics = {"method": recipe.method, **summary.measures(before, after), "resolved": {"lr": 2e-4}, "notes": ["a < b"]}
    metrics["training"] = {"seconds": 12.0, "steps": 300, "steps_per_second": 25.0, "trainable_parameters": 1234}
    metrics |= {"timings": {"training": 12.0}, "environment": summary.environment(torch.device("cpu"), None)}
    shown = {"recipe": recipe.to_dict(), "data": "d", "data_name": "d & d", "classes": list(after.classes), "template": "a {}."}
    path = tmp_path / "report.html"
    report.write(path, shown, metrics, before, after, test, history if recipe.trains else None)
    return path.read_text(encoding="utf-8")


class TestReport:
    @pytest.mark.parametrize("classes", [2, 10, 25, 120])
    def test_is_one_well_formed_file(self, tmp_path: Path, classes: int) -> None:
        page = written(tmp_path, classes)
        checker = Checker()
        checker.feed(page)
        assert checker.open == [] and 1 <= checker.pictures <= report.MOST_MISTAKES
        assert page.count("<tr><td>&lt;class&gt; &amp; 1</td>") >= 1 and "<class>" not in page
        assert "d &amp; d" in page and "a &lt; b" in page and "1,234" in page
        assert len(page) < 2_000_000

    def test_ids_are_not_shared_between_plots(self, tmp_path: Path) -> None:
        ids = re.findall(r'\bid="([^"]+)"', written(tmp_path, 4))
        assert len(ids) == len(set(ids)) > 10

    def test_plots_take_the_colour_of_the_page(self, tmp_path: Path) -> None:
        page = written(tmp_path, 4)
        assert "currentColor" in page and report.INK not in page and "prefers-color-scheme: dark" in page

    def test_without_training_there_are_no_curves(self, tmp_path: Path) -> None:
        page = written(tmp_path, 4, method="linear-probe")
        assert "training-curves" not in page and "linear probe" in page
