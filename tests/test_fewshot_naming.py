"""Class names that a model may not know, or not tell apart, are reported by every command that reads data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastlora.fewshot import datasets
from fastlora.fewshot.datasets import Reading
from pictures import make_folder, train_arguments

IDS = ["n01440764", "n02102040", "n02979186"]


def notes(folder: Path, how: Reading | None = None) -> str:
    return "\n".join(datasets.load(str(folder), how=how).notes)


@pytest.mark.parametrize(
    ("names", "pair"),
    [
        (["Cat", "cat", "dog"], "1, the first 'Cat' and 'cat'"),
        (["file", "\ufb01le", "FILE"], "2, the first 'FILE' and 'file'"),
        (["ABC", "\uff21\uff22\uff23"], "1, the first 'ABC' and '\uff21\uff22\uff23'"),
        (["sea horse", "sea  horse"], "1, the first 'sea  horse' and 'sea horse'"),
        (["zoo", "zo\u200bo"], "1, the first 'zoo' and 'zo\\u200bo'"),
    ],
    ids=["case", "ligature", "full width", "spaces", "unseen"],
)
def test_names_that_look_alike(tmp_path: Path, names: list[str], pair: str) -> None:
    assert f"differ only in case, spaces or Unicode form: {pair}" in notes(make_folder(tmp_path / "d", names, images=1))


@pytest.mark.parametrize("names", [["cat", "cats", "dog"], ["café", "cafe"], ["2nd", "nd2"]])
def test_names_that_do_not_are_not_worth_a_line(tmp_path: Path, names: list[str]) -> None:
    assert notes(make_folder(tmp_path / "d", names, images=1)) == ""


@pytest.mark.parametrize("names", [["1", "2", "10"], ["01", "02", "10"]])
def test_numbers_as_names_of_folders(tmp_path: Path, names: list[str]) -> None:
    said = notes(make_folder(tmp_path / "d", names, images=1))
    assert said == f"classes without names, prompted as the numbers {names[0]} to 10: --class-names FILE names them"


class TestWordNet:
    def test_ids_as_names(self, tmp_path: Path) -> None:
        for role in ("train", "val"):
            make_folder(tmp_path / "d" / role, IDS, images=1)
        said = notes(tmp_path / "d")
        assert (
            "prompted as WordNet ids, which are no words to a model: 3, the first is n01440764: --class-names FILE names"
            in said
        )

    @pytest.mark.parametrize(
        ("name", "separator", "more"),
        [("classnames.txt", " ", ""), ("LOC_synset_mapping.txt", " ", ", another word"), ("words.txt", "\t", "")],
    )
    @pytest.mark.parametrize("above", [False, True])
    def test_a_file_beside_them_that_names_them(
        self, tmp_path: Path, name: str, separator: str, more: str, above: bool
    ) -> None:
        root = make_folder(tmp_path / "above" / "d", [*IDS, "fish"] if above else IDS, images=1)
        file = (root.parent if above else root) / name
        file.write_text("".join(f"{wnid}{separator}word {i}{more}\n" for i, wnid in enumerate([*IDS, "n00000001"])))
        assert f"--class-names FILE, such as {file}, names them" in notes(root)
        if not above:
            named = datasets.load(str(root), how=Reading(class_names=str(file)))
            assert (named.classes, named.notes) == (("word 0", "word 1", "word 2"), ())
        file.write_text(f"{IDS[0]}{separator}tench\n")  # does not name them all
        assert "--class-names FILE names them" in notes(root)


def test_every_command_says_so(fastlora: Any, tmp_path: Path, model: str) -> None:
    root, out = make_folder(tmp_path / "d", ["Cat", "cat"], images=3), tmp_path / "r"
    says = "differ only in case"
    assert says in fastlora("data", str(root)).out
    assert says in fastlora(*train_arguments(root, out, model)).out
    assert says in "".join(json.loads((out / "metrics.json").read_text())["notes"])
    assert says in fastlora("eval", str(out), str(root)).out
