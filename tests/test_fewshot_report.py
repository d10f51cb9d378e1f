"""Results and report.html: numbers that agree with a plain count, one file that needs nothing else."""

from __future__ import annotations

import csv
import dataclasses
import html
import mmap
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastlora.fewshot import report, summary
from fastlora.fewshot.datasets import Item
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.report import mistakes, plots
from fastlora.fewshot.result import BINS, Result
from pictures import photo


def result(classes: int = 4, images: int = 200, seed: int = 0) -> Result:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits = 2 * torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 3
    return Result.of(tuple(f"<class> & {i}" for i in range(classes)), labels, logits)


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
        rows = Result.of(("a", "b"), labels, torch.tensor([[1.0, 0.0], [1.0, 0.0]])).per_class()
        assert rows == [("a", 2, 100.0), ("b", 0, None)]

    def test_csv(self, tmp_path: Path) -> None:
        r = result(images=5)
        r.write_csv(tmp_path / "p.csv", [f"é {i}.png" for i in range(5)])
        with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["predicted"] for row in rows] == [r.classes[i] for i in r.predicted]
        assert rows[3]["image"] == "é 3.png"
        assert [int(row["class_rank"]) for row in rows] == [int(rank) + 1 for rank in r.rank]
        assert [float(row["class_probability"]) for row in rows] == pytest.approx(r.truth.tolist(), abs=1e-4)

    def test_top_k_is_scikit_learns(self) -> None:
        from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

        generator = torch.Generator().manual_seed(3)
        labels, logits = torch.randint(0, 8, (300,), generator=generator), torch.randn(300, 8, generator=generator)
        r = Result.of(tuple("abcdefgh"), labels, logits)
        for k in (1, 2, 5):
            assert r.top(k) == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=k, labels=range(8)))
        assert r.top(1) == r.accuracy and r.top(8) == 100
        assert r.mean_of_classes == pytest.approx(100 * balanced_accuracy_score(labels, r.predicted))
        assert torch.equal(r.truth == r.confidence, r.labels == r.predicted)

    def test_mistakes_are_the_surest_first(self) -> None:
        r = result()
        order = r.mistakes()
        assert set(order.tolist()) == {i for i in range(200) if r.labels[i] != r.predicted[i]}
        assert r.confidence[order].tolist() == sorted(r.confidence[order].tolist(), reverse=True)

    def test_no_images(self) -> None:
        r = Result.of(("a", "b"), torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
        assert (r.accuracy, r.top(1), r.mean_of_classes, r.calibration_error) == (0, 0, 0, 0) and len(r.mistakes()) == 0


class TestCalibration:
    def test_by_hand(self) -> None:
        """Four images at 0.9, of which two are right, and one at 0.6 that is right: ECE = 4/5 · 40 + 1/5 · 40."""
        confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.6])
        labels, predicted = torch.tensor([0, 0, 1, 1, 0]), torch.zeros(5, dtype=torch.int64)
        r = Result(("a", "b"), labels, predicted, confidence, confidence, (labels != predicted).long())
        assert r.calibration_error == pytest.approx(40, abs=1e-4)
        filled = [b for b in r.bins() if b.images]
        assert [(b.images, b.accuracy) for b in filled] == [(1, 100.0), (4, 50.0)]
        assert all(b.low < b.confidence / 100 <= b.high for b in filled if b.confidence is not None)

    def test_bins_partition_the_images(self) -> None:
        r = result(images=500)
        bins = r.bins()
        assert len(bins) == BINS and sum(b.images for b in bins) == 500
        assert bins[0].low == 0 and bins[-1].high == 1
        edge = Result.of(("a", "b"), torch.tensor([0, 0]), torch.tensor([[90.0, 0.0], [0.0, 0.0]]))
        assert [i for i, b in enumerate(edge.bins()) if b.images] == [7, 14]  # 0.5 lies in (7/15, 8/15], 1 in the last

    def test_a_calibrated_model_has_no_error_and_a_sure_one_has(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(20000, 3, generator=generator)
        labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        fair, sure = Result.of(("a", "b", "c"), labels, logits), Result.of(("a", "b", "c"), labels, 5 * logits)
        assert fair.calibration_error < 1.5 and sure.calibration_error > 20


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


def written(tmp_path: Path, classes: int, more: dict[str, Any] | None = None, **config: Any) -> str:
    before, after = result(classes, seed=1), result(classes, seed=2)
    before = dataclasses.replace(before, labels=after.labels)
    test = [Item(int(label), f"{i}.png", photo(20, 20, i)) for i, label in enumerate(after.labels)]
    recipe = Recipe(**config)
    history = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    metrics = {"method": recipe.method, **summary.measures(before, after), "resolved": {"lr": 2e-4}, "notes": ["a < b"]}
    metrics["training"] = {"seconds": 12.0, "steps": 300, "steps_per_second": 25.0, "trainable_parameters": 1234}
    metrics |= {"timings": {"training": 12.0}, "environment": summary.environment(torch.device("cpu"), None)}
    shown = {"recipe": recipe.to_dict(), "data": "d", "data_name": "d & d", "classes": list(after.classes), "template": "a {}."}
    metrics |= more or {}
    path = tmp_path / "report.html"
    report.write(path, shown, metrics, before, after, test, history if recipe.trains else None)
    return path.read_text(encoding="utf-8")


class TestReport:
    @pytest.mark.parametrize("classes", [2, 10, 25, 120])
    def test_is_one_well_formed_file(self, tmp_path: Path, classes: int) -> None:
        page = written(tmp_path, classes)
        checker = Checker()
        checker.feed(page)
        assert checker.open == [] and 1 <= checker.pictures <= mistakes.MOST_PICTURES
        assert page.count("<tr><td>&lt;class&gt; &amp; 1</td>") >= 1 and "<class>" not in page
        assert "d &amp; d" in page and "a &lt; b" in page and "1,234" in page
        assert len(page) < 2_000_000

    def test_ids_are_not_shared_between_plots(self, tmp_path: Path) -> None:
        ids = re.findall(r'\bid="([^"]+)"', written(tmp_path, 4))
        assert len(ids) == len(set(ids)) > 10

    def test_plots_take_the_colour_of_the_page(self, tmp_path: Path) -> None:
        page = written(tmp_path, 4)
        assert "currentColor" in page and plots.INK not in page and "prefers-color-scheme: dark" in page

    def test_without_training_there_are_no_curves(self, tmp_path: Path) -> None:
        page = written(tmp_path, 4, method="linear-probe")
        assert "training-curves" not in page and "linear probe" in page

    def test_every_link_leads_to_a_section(self, tmp_path: Path) -> None:
        page = written(tmp_path, 4)
        links = re.findall(r'<a href="#([^"]+)">', page)
        assert links == re.findall(r'<h2 id="([^"]+)"', page) and {"training", "calibration", "mistakes", "weakest"} <= set(
            links
        )

    def test_halves_and_other_sets_are_shown_where_they_were_measured(self, tmp_path: Path) -> None:
        plain = written(tmp_path, 4)
        assert "Base to new" not in plain and "On other data sets" not in plain
        halves = {"base": 80.0, "new": 60.0, "harmonic_mean": 68.6, "base_classes": 4, "new_classes": 3}
        halves["zero_shot"] = {"base": 50.0, "new": 65.5, "harmonic_mean": 56.7}  # type: ignore[assignment]
        also = {"data": "a/b <c>", "classes": 2, "test_images": 9, "zero_shot": 40.0, "accuracy": 31.2, "change": -8.8}
        page = written(tmp_path, 4, {"base_to_new": halves, "also": [also], "memory": {"process": 3 << 30, "gpu": 5 << 20}})
        assert '<span class="good">+30.0</span>' in page and '<span class="bad">−5.5</span>' in page
        assert "b &lt;c&gt;" in page and '<span class="bad">−8.8</span>' in page
        assert "3.00 GiB" in page and "5 MiB" in page

    def test_pictures_are_the_worst(self) -> None:
        after = result(4, seed=2)
        test = [Item(int(label), f"{i}.png", photo(20, 20, i)) for i, label in enumerate(after.labels)]
        sure = [int(i) for i in re.findall(r'title="(\d+).png"', mistakes.surest(after, test))]
        wrong = [i for i in range(200) if after.labels[i] != after.predicted[i]]
        best = sorted(wrong, key=lambda i: -float(after.confidence[i]))
        assert sure[0] == best[0] and set(sure) <= set(wrong) and len(sure) == 8  # two of each class
        assert max(after.labels[sure].bincount()) == mistakes.MOST_A_CLASS
        cases = mistakes.weakest_classes(after, test).split('<div class="case">')[1:]
        accuracies = {name: accuracy for name, _, accuracy in after.per_class()}
        names = [html.unescape(re.findall(r"<b>(.*?)</b>", case)[0]) for case in cases]
        assert [accuracies[name] for name in names] == sorted(accuracies.values())  # type: ignore[type-var]
        for name, case in zip(names, cases, strict=True):
            shown = [int(i) for i in re.findall(r'title="(\d+).png"', case)]
            own = [i for i in wrong if after.classes[after.labels[i]] == name]
            assert shown == sorted(own, key=lambda i: float(after.truth[i]))[: mistakes.WORST]

    def test_nothing_mistaken(self) -> None:
        labels = torch.tensor([0, 1])
        perfect = Result.of(("a", "b"), labels, 9 * torch.eye(2))
        test = [Item(0, "0.png", photo(20, 20, 0)), Item(1, "1.png", photo(20, 20, 1))]
        assert mistakes.surest(perfect, test) == "" == mistakes.weakest_classes(perfect, test)


def test_peak_memory_sees_what_was_freed_again() -> None:
    from fastlora.fewshot import memory

    device = torch.device("cpu")
    memory.reset_peak(device)
    low = memory.peak(device)["process"]
    with mmap.mmap(-1, 64 << 20) as held:  # never from what the process has freed before
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    assert low + (48 << 20) < memory.peak(device)["process"] < low + (256 << 20)
