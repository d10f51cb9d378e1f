"""Data as users get them wrong, by every command that reads data: exit code 2, one line, nothing written, nothing loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastlora.fewshot import models, trainer
from fastlora.fewshot.datasets import generated
from fastlora.fewshot.datasets.generated import Mini
from fastlora.fewshot.recipe import Recipe
from pictures import make_folder, one_line

SPLIT = "eurosat/split_zhou_EuroSAT.json"
# A place that holds good/ (train, test; classes a, b) and eurosat/ -> DATA and more arguments, of which one is wrong.
Spoil = Callable[[Path], list[str]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """good/ in folders of two splits, eurosat/ in CoOp's layout, and run/, which was finished on good/."""
    place = tmp_path_factory.mktemp("sound")
    for role, count in (("train", 3), ("test", 1)):
        make_folder(place / "good" / role, ["a", "b"], images=count)
    generated.write(place, ["eurosat"], Mini(classes=2, train=2, val=1, test=1, side=16))
    recipe = Recipe(model="mini", pretrained=None, method="zero-shot")
    trainer.run(trainer.Job(recipe, str(place / "good"), place / "run", device="cpu", brief=True), Console(quiet=True))
    return place


def split(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """A change of what CoOp's split file says."""

    def spoil(place: Path) -> list[str]:
        said = json.loads((place / SPLIT).read_text())
        change(said)
        (place / SPLIT).write_text(json.dumps(said))
        return ["eurosat", "--root", str(place)]

    return spoil


def table(text: str | bytes) -> Spoil:
    """A table, below whose folder good/ lies."""

    def spoil(place: Path) -> list[str]:
        (place / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return [str(place / "list.csv")]

    return spoil


def folders(change: Callable[[Path], Any], *more: str) -> Spoil:
    """A change of good/."""

    def spoil(place: Path) -> list[str]:
        change(place / "good")
        return [str(place / "good"), *(word.format(place=place) for word in more)]

    return spoil


def relabel(said: dict[str, Any], label: int, name: str) -> None:
    """Class 1 gets another number and name."""
    for rows in said.values():
        rows[:] = [[path, label, name] if k == 1 else [path, k, old] for path, k, old in rows]


ROWS = "good/train/a/0.png,{},train\ngood/train/b/0.png,{},train\n"
TESTED = "good/test/a/0.png,{},test\ngood/test/b/0.png,{},test\n"
HEAD = "path,label,split\n"
WRONG: dict[str, tuple[Spoil, str]] = {
    "split-names-missing-images": (
        split(lambda said: said["train"].append(["Forest/none.jpg", *said["train"][0][1:]])),
        "data set eurosat: 1 of 9 images are missing, the first is",
    ),
    "split-is-no-json": (
        lambda place: [(place / SPLIT).write_text("{"), ["eurosat", "--root", str(place)]][1],  # type: ignore[list-item]
        "is not a split file of CoOp's layout",
    ),
    "split-labels-with-a-gap": (split(lambda said: relabel(said, 2, "x")), "labels are not 0 to 1, 1 is missing"),
    "split-names-one-class-twice": (
        split(lambda said: relabel(said, 1, said["train"][0][2])),
        "labels 0 and 1 in",
    ),
    "split-class-without-test": (
        split(lambda said: said.update(test=[row for row in said["test"] if row[1] == 0])),
        "has no test image: add some, or remove the class",
    ),
    "table-names-missing-images": (table(HEAD + ROWS.format("a", "b") + "x.png,a,test\n"), "1 of 3 images are missing"),
    "table-labels-with-a-gap": (table(HEAD + ROWS.format(0, 2)), "labels have a gap, 1 is never used and 2 is"),
    "table-one-class": (table(HEAD + ROWS.format("a", "a")), "has one class, 'a': give it at least two"),
    "table-one-class-by-two-names": (table(HEAD + ROWS.format("a b", "a_b")), "both mean the class 'a b': rename one"),
    "table-class-without-test": (
        table(HEAD + ROWS.format("a", "b") + TESTED.format("a", "a")),
        "class 'b' has no test image: add some, or remove the class",
    ),
    "table-no-csv": (table(b"\x00\x01\xff\xfe"), "list.csv is not a readable table in UTF-8"),
    "table-open-quote": (table('path,label\n"good/train/a/0.png,a\n'), "list.csv is not a readable table in UTF-8"),
    "table-empty": (table(""), "list.csv is empty: its first row names the columns"),
    "table-without-label": (table("path,colour\ngood/train/a/0.png,a\n"), "has no column for the label"),
    "folder-one-class": (folders(lambda good: shutil.rmtree(good / "train" / "b")), "holds 1 class folders"),
    "folder-class-without-test": (
        folders(lambda good: shutil.rmtree(good / "test" / "b")),
        "good: class 'b' has no test image: add some, or remove the class",
    ),
    "folder-class-by-two-names": (
        folders(lambda good: [make_folder(good / role, ["x_y", "x y"], 1) for role in ("train", "test")]),
        "both mean the class 'x y': rename one",
    ),
    "class-names-twice": (
        folders(lambda good: (good / "names.txt").write_text("cat\ncat\n"), "--class-names", "{place}/good/names.txt"),
        "both mean the class 'cat': rename one",
    ),
    "class-names-too-many": (
        folders(lambda good: (good / "names.txt").write_text("a\nb\nc\n"), "--class-names", "{place}/good/names.txt"),
        "holds 3 class names, good has 2 classes",
    ),
    "no-such-column": (
        lambda place: [*table("path,label\ngood/train/a/0.png,a\n")(place), "--label-column", "kind"],
        "has no column 'kind' (--label-column): it has path, label",
    ),
    "tar-that-is-none": (
        lambda place: [(place / "x.tar").write_bytes(b"none"), [str(place / "x.tar")]][1],  # type: ignore[list-item]
        "x.tar is not a readable tar",
    ),
}


def below(place: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in place.rglob("*")}


@pytest.mark.parametrize(("spoil", "says"), WRONG.values(), ids=WRONG)
def test_wrong_data(
    fastlora: Any, monkeypatch: pytest.MonkeyPatch, sound: Path, tmp_path: Path, spoil: Spoil, says: str
) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded before the data were checked"))
    place = tmp_path / "place"
    shutil.copytree(sound, place)
    data, *more = spoil(place)
    before = below(tmp_path)
    out = str(tmp_path / "out")
    one_line(fastlora("data", data, *more), says)
    one_line(fastlora("train", data, *more, "--out", out, "--model", "mini"), says)
    one_line(fastlora("sweep", "--data", data, *more, "--out", out, "--model", "mini", "--shots", "1"), says)
    one_line(fastlora("eval", str(place / "run"), data, *more, "--out", out), says)
    assert below(tmp_path) == before, "a refused command left something behind"


def test_eval_needs_no_training_images(fastlora: Any, sound: Path, tmp_path: Path) -> None:
    table = sound / "test.csv"
    table.write_text(HEAD + TESTED.format("a", "b"))
    assert fastlora("eval", str(sound / "run"), str(table)).code == 0
    for command in (["data", str(table)], ["train", str(table), "--out", str(tmp_path / "r"), "--model", "mini"]):
        one_line(fastlora(*command), "test has no training image: no split in it is called train")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("data: [x\nshots: 1\n", "line 2"),
        ("data: x\n\tshots: 1\n", "line 2"),
        ("data: x\nshotz: 1\n", "unknown option 'shotz': did you mean shots?"),
        ("data: x\nshots: one\n", "shots must be whole numbers of at least 1, got 'one'"),
        ("data: x\nmetod: lora\n", "unknown option 'metod': did you mean method?"),
        ("data: x\nrank: [2, 2000]\n", "rank must be a whole number from 1 to 128, got 2000"),
        ("data: x\ndata: y\n", "the key 'data' stands there twice"),
        ("- data\n", "holds no mapping"),
        ("shots: 1\n", "data is missing"),
        ("data: digits\nclass_name: names.txt\n", "unknown option 'class_name': did you mean class_names?"),
        ("data: digits\nmodel: mini\ntemplate: a photo\n", "template must hold {} once"),
        ("data: digits\nmodel: mini\nclass_names: none.txt\n", "cannot read none.txt: No such file"),
        ("data: digits\nmodel: mini\nlabel_column: x\n", "DATA digits is scikit-learn's digits, which has no columns"),
        ("data: [digits, nowhere]\nmodel: mini\n", "DATA nowhere does not exist"),
    ],
)
def test_wrong_grids(fastlora: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, says: str) -> None:
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("the model was loaded before the grid was checked"))
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    one_line(fastlora("sweep", str(grid), "--out", str(tmp_path / "out")), says)
    assert not (tmp_path / "out").exists()
