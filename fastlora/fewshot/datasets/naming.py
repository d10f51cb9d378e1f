"""Class names that a model may not know, or not tell apart: said before anybody trusts a prompt made of them."""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .base import WORDNET_ID, Dataset
from .words import read_class_names

__all__ = ["with_remarks"]

# Files that name WordNet's ids: CoOp's, Kaggle's, Tiny-ImageNet's.
SYNSETS = ("classnames.txt", "LOC_synset_mapping.txt", "words.txt")


def with_remarks(dataset: Dataset, place: Path | None = None) -> Dataset:
    """Return `dataset` with a note on each kind of doubtful class name.

    Args:
        place: where the data set lies; a file there, or one folder above, may name its classes.
    """
    return dataclasses.replace(dataset, notes=(*dataset.notes, *_remarks(dataset.classes, place)))


def _remarks(classes: Sequence[str], place: Path | None) -> Iterator[str]:
    if all(name.isdecimal() for name in classes):
        first, *_, last = sorted(classes, key=int)
        yield f"classes without names, prompted as the numbers {first} to {last}: --class-names FILE names them"
    if ids := [name for name in classes if re.fullmatch(WORDNET_ID, name)]:
        file = _file_of_synsets(ids, place)
        such = f", such as {file}," if file is not None else ""
        yield (
            f"classes prompted as WordNet ids, which are no words to a model: {len(ids)}, the first is {ids[0]}:"
            f" --class-names FILE{such} names them"
        )
    if alike := _alike(classes):
        first, second = alike[0]
        yield f"class names that differ only in case, spaces or Unicode form: {len(alike)}, the first {first!r} and {second!r}"


def _alike(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of different names that look alike: each name with the first that looks like it."""
    first: dict[str, str] = {}
    pairs = [(first.setdefault(_look(name), name), name) for name in dict.fromkeys(classes)]
    return [pair for pair in pairs if pair[0] != pair[1]]


def _look(name: str) -> str:
    """`name` without case, compatibility forms (ﬁ, full width), marks that cannot be seen, and all but single spaces."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(c) != "Cf")
    return " ".join(seen.split())


def _file_of_synsets(ids: Sequence[str], place: Path | None) -> Path | None:
    """The file beside the data that names all of these WordNet ids, as --class-names takes it."""
    for file in [folder / name for folder in (place, place.parent) for name in SYNSETS] if place is not None else []:
        try:
            names = read_class_names(file)
        except UserError:
            continue
        if isinstance(names, dict) and names.keys() >= set(ids):
            return file
    return None
