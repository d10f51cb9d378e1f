"""Data sets of torchvision by name, and any torch Dataset of (image, label) as a Python object."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch.utils.data import ConcatDataset, Subset

from ..errors import UserError
from .base import Dataset, Lazy, Row, class_name, from_rows, places_of
from .naming import with_remarks

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
        return _gather(name, make(train=True), test=make(train=False))
    if "split" not in parameters:
        return _gather(name, make())
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
    return _gather(name, **found)


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
        classes: class names, in the order of the labels of `train`; None for those that it has (.classes or .categories), else
            the numbers.

    A `val` or `test` with class names of its own is matched by them; one without has the labels of `train`.

    Raises:
        UserError: a set that gives something else, for example tensors: give it without a transform; a class of `val` or `test`
            that `train` does not have.
    """
    return with_remarks(_gather(name, train, val, test, classes))


def _gather(name: str, train: Any, val: Any = None, test: Any = None, classes: Sequence[str] | None = None) -> Dataset:
    """As `from_torch`, without what there is to say of the names."""
    own = _names(name, train)
    known = classes if own is None else own
    rows = []
    for role, part in (("train", train), ("val", val), ("test", test)):
        if part is not None:
            labels = _labels(name, part)
            if part is not train and (names := _names(name, part)) is not None:
                labels = _by_name(f"{name}, {role}", labels, names, known)
            rows += [Row(role, str(k), f"{role} {i}", Lazy(partial(_image, part, i))) for i, k in enumerate(labels)]
    return from_rows(name, name, rows, own if classes is None else classes)


def _by_name(where: str, labels: list[int], names: Sequence[str], known: Sequence[str] | None) -> list[int]:
    """`labels`, which index `names`, as indices of `known`.

    Raises:
        UserError: a label without a name, or a class that is none of `known`.
    """
    if known is None:
        raise UserError(f"{where} has class names, the training set has none: give classes, in the order of its labels")
    if [class_name(n) for n in names] == [class_name(n) for n in known]:
        return labels
    places = places_of(names, known)
    found = []
    for label in labels:
        if not 0 <= label < len(places):
            raise UserError(f"{where} has label {label}, but {len(names)} class names")
        if (place := places[label]) is None:
            raise UserError(
                f"{where}: class {names[label]!r} is not in the training set: leave its images out, or train on it too"
            )
        found.append(place)
    return found


def _names(name: str, part: Any) -> list[str] | None:
    """The class names that a set has, or the sets that a Subset or ConcatDataset is made of.

    Raises:
        UserError: sets that were joined and number their classes in different ways.
    """
    for key in NAMES:
        if isinstance(found := getattr(part, key, None), Sequence) and not isinstance(found, str):
            # ImageNet has several words for a class
            return [str(c[0]) if isinstance(c, (tuple, list)) and c else str(c) for c in found]
    inner = part.datasets if isinstance(part, ConcatDataset) else [part.dataset] if isinstance(part, Subset) else []
    several = [_names(name, one) for one in inner]
    if any(names != several[0] for names in several):
        raise UserError(f"{name} joins sets that number their classes in different ways: give them the same classes first")
    return several[0] if several else None


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
