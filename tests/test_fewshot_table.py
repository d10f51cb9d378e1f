"""Data sets that a CSV, TSV or Parquet file lists, and the mistakes people make in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlora.fewshot import datasets
from fastlora.fewshot.errors import UserError
from pictures import make_folder

HEADER = "path,label,split\n"
ROWS = "a/red 0.png,red,train\na/green 0.png,green,Training\na/red 1.png,red,test\na/green 1.png,green,testing\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("table")
    pictures = make_folder(root / "pictures", ["red", "green"], images=2)
    (root / "a").mkdir()
    for name in ("red", "green"):
        for i, path in enumerate(sorted((pictures / name).iterdir())):
            path.rename(root / "a" / f"{name} {i}.png")
    return root


def write(folder: Path, text: str, name: str = "list.csv", encoding: str = "utf-8") -> str:
    (folder / name).write_text(text, encoding=encoding)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", HEADER + ROWS),
        ("bom.csv", "\ufeff" + HEADER + ROWS),
        ("list.tsv", (HEADER + ROWS).replace(",", "\t")),
        ("other names.csv", "Class,Subset,more,FileName\n" + "".join(
            f"{label},{split},x,{path}\n" for path, label, split in (row.split(",") for row in ROWS.splitlines())
        )),
    ],
)  # fmt: skip
def test_a_table_is_a_data_set(folder: Path, name: str, text: str) -> None:
    read = datasets.load(write(folder, text, name))
    assert read.classes == ("green", "red") and read.test is not None
    assert [(item.label, item.name) for item in read.train] == [(1, "a/red 0.png"), (0, "a/green 0.png")]
    assert [item.source for item in read.test] == [folder / "a" / "red 1.png", folder / "a" / "green 1.png"]


def test_parquet_and_no_split(folder: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    columns = {"image": ["a/red 0.png", "a/red 1.png", "a/green 0.png", "a/green 1.png"], "label": [0, 0, 1, 1]}
    parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
    read = datasets.load(str(folder / "list.parquet"))
    assert read.classes == ("0", "1") and len(read.train) == 4 and read.test is None
    assert "--class-names" in read.notes[0]
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        datasets.load(str(folder / "broken.parquet"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty: its first row names the columns"),
        (HEADER, "lists no image"),
        (
            "path,colour\na/red 0.png,red\n",
            "no column for the label: it has path, colour; name one label or class",
        ),
        ("picture,label\na/red 0.png,red\n", "no column for the image"),
        (HEADER + "a/red 0.png,red\n", "row 2: 2 cells, but the first row names 3 columns"),
        (HEADER + "a/red 0.png,,train\n", "row 2: label is empty"),
        (HEADER + "a/red 0.png,red,later\n", "row 2: split is 'later': write train, val or test"),
        (HEADER + ROWS + "a/blue.png,blue,train\n", r"1 of 5 images are missing, the first is .*blue.png .paths start from"),
        (HEADER + "a/red 0.png,red,train\na/red 1.png,red,test\n", "has one class, 'red'"),
        (HEADER + "a/red 0.png,red,train\na/red 0.png,green,train\n", "lists a/red 0.png twice"),
        (HEADER + "a/red 0.png,0,train\na/green 0.png,2,train\n", "labels have a gap, 1 is never used"),
        ('path,label\n"a/red 0.png,red\n', "not a readable table"),
    ],
)
def test_mistakes_are_one_line(folder: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        datasets.load(write(folder, text))
    assert "\n" not in str(error.value)


def test_another_encoding_is_told(folder: Path) -> None:
    with pytest.raises(UserError, match="not a readable table in UTF-8"):
        datasets.load(write(folder, "path,label\na,Stra\xdfe\n", encoding="latin-1"))
