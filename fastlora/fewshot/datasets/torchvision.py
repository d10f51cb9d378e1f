"""Data sets of torchvision by name, and any torch Dataset of (image, label) as a Python object."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from ..errors import UserError
from .base import Dataset, Lazy, Row, from_rows

__all__ = ["from_torch", "read"]

# What torchvision calls the splits, by class; the first that a class knows counts.
SPLITS = {"train": ("train", "trainval", "train-standard"), "val": ("val", "valid"), "test": ("test",)}
# Where its classes keep labels and class names.
LABELS = ("targets", "labels", "y", "_labels", "_targets", "samples", "_samples")
NAMES = ("classes", "categories")


def read(name: str, root: Path) -> Dataset:
    """torchvision's data set of this name, whose files lie below `root`; they are downloaded where they are not there.

    Raises:
        UserError: no such data set, one that needs arguments of its own or is not of (image, label), or files that cannot
            be had.
    """
    import torchvision.datasets as library

    kind = getattr(library, name, None)
    if name not in library.__all__ or not inspect.isclass(kind) or kind is library.VisionDataset:
        import difflib

        close = difflib.get_close_matches(name, library.__all__, n=1, cutoff=0.4)
        raise UserError(f"torchvision has no data set {name!r}" + (f": did you mean {close[0]}?" if close else ""))
    parameters = inspect.signature(kind).parameters
    needed = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if more := [word for word in needed if word not in ("root", "split")]:
        raise UserError(f"torchvision:{name} needs {', '.join(more)}: make it in Python and give it to datasets.from_torch")
    make = partial(_make, kind, name, root, "download" in parameters)
    if "train" in parameters:
        return from_torch(name, make(train=True), test=make(train=False))
    if "split" not in parameters:
        return from_torch(name, make())
    found = {}
    for role, words in SPLITS.items():
        for word in words:
            try:
                found[role] = make(split=word)
                break
            except ValueError as error:  # it knows no split of this name
                refused = error
    if "train" not in found:
        raise UserError(f"torchvision:{name} has no split for training: {' '.join(str(refused).split())}")
    return from_torch(name, **found)


def _make(kind: Any, name: str, root: Path, downloads: bool, **which: Any) -> Any:
    arguments = which | ({"root": str(root)} if "root" in inspect.signature(kind).parameters else {})
    try:
        return kind(**arguments)
    except (RuntimeError, OSError) as error:
        first = error
    try:
        if downloads:
            return kind(**arguments, download=True)
    except (RuntimeError, OSError) as error:
        first = error
    said = (str(first).strip().splitlines() or [type(first).__name__])[0]
    also = ", and cannot be downloaded" if downloads else ""
    raise UserError(f"torchvision:{name} is not in {root}{also}: {said}") from first


def from_torch(name: str, train: Any, val: Any = None, test: Any = None, classes: Sequence[str] | None = None) -> Dataset:
    """A data set of torch Datasets that give (PIL image, label): torchvision's, or one's own.

    Args:
        name: what reports call it.
        train: what shots are drawn from.
        val: what validation shots are drawn from.
        test: what accuracy is measured on; None for what the shots leave of `train`.
        classes: class names; None for those that `train` has (.classes or .categories), else the numbers.

    Raises:
        UserError: a set that gives something else, for example tensors: give it without a transform.
    """
    if classes is None:
        named = next((found for key in NAMES if isinstance(found := getattr(train, key, None), Sequence)), None)
        # ImageNet has several words for a class
        classes = None if named is None else [str(c) if isinstance(c, str) else str(c[0]) for c in named]
    rows = []
    for role, part in (("train", train), ("val", val), ("test", test)):
        if part is not None:
            labels = _labels(name, part)
            rows += [Row(role, str(k), f"{role} {i}", Lazy(partial(_image, part, i))) for i, k in enumerate(labels)]
    return from_rows(name, name, rows, classes)


def _labels(name: str, part: Any) -> list[int]:
    """The label of each image, without decoding them where the set keeps a list."""
    count = len(part)
    tried = {i: _label(name, part[i]) for i in {0, count // 2, count - 1} if count}
    for key in LABELS:
        kept = getattr(part, key, None)
        try:
            labels = [int(pair[-1]) if isinstance(pair, (tuple, list)) else int(pair) for pair in kept]  # type: ignore[union-attr]
        except (TypeError, ValueError):
            continue
        # a list of this name may be of something else: it must say what the set itself says
        if len(labels) == count and all(labels[i] == label for i, label in tried.items()):
            return labels
    return [_label(name, part[i]) for i in range(count)]


def _label(name: str, pair: Any) -> int:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], Image):
        what = [type(part).__name__ for part in pair] if isinstance(pair, (tuple, list)) else type(pair).__name__
        raise UserError(f"{name} gives {what}, not (PIL image, label): give a data set of images, without a transform")
    try:
        return int(pair[1])
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} has labels as {pair[1]!r}: they must be whole numbers") from error


def _image(part: Any, i: int) -> Image:
    return part[i][0]
