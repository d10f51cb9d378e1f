"""What every source gives: a Dataset of Items, which name images and say where they are. Nothing is decoded here."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from ..errors import UserError

__all__ = [
    "IMAGE_ENDINGS",
    "TEMPLATE",
    "WORDNET_ID",
    "Dataset",
    "Item",
    "Lazy",
    "Row",
    "check_test",
    "check_training",
    "class_name",
    "from_rows",
    "places_of",
    "role_of",
]

TEMPLATE = "a photo of a {}."
WORDNET_ID = r"n\d{8}"
IMAGE_ENDINGS = (".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
                 ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")  # fmt: skip
ROLES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An image that no file of its own holds: `read` gives its encoded bytes, or the image, each time it is needed.

    Images are decoded on several threads, so `read` must bear being called from any of them.
    """

    read: Callable[[], bytes | Image]


@dataclasses.dataclass(frozen=True)
class Item:
    """One image: its class, a name that is unique in its data set, and a file, an RGB array uint8 (h, w, 3), or a Lazy."""

    label: int
    name: str
    source: Path | np.ndarray | Lazy


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Lists of images by role.

    Args:
        name: what reports call it.
        classes: class names as they go into the prompt; item labels index them.
        train: what shots are drawn from.
        val: what validation shots are drawn from; may be empty.
        test: what accuracy is measured on; None where it is whatever the shots leave of `train`.
        template: the prompt of this set.
        own_template: the prompt that CoOp wrote for this set, where it is one of CoOp's; the paper's recipe does not use it.
        flip: whether a mirrored image still belongs to its class.
        generated: whether the images were drawn by fastlora and only have the layout of the set they are named after.
        notes: what was left out, one line each.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...] = ()
    test: tuple[Item, ...] | None = None
    template: str = TEMPLATE
    own_template: str | None = None
    flip: bool = True
    generated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def tested(self) -> tuple[Item, ...]:
        """The test images; where the set keeps none, all that could be."""
        return self.train if self.test is None else self.test


@dataclasses.dataclass(frozen=True)
class Row:
    """One image as a source lists it: its role (None where the source has none), its label as text, name and source."""

    role: str | None
    label: str
    name: str
    source: Path | Lazy


def class_name(label: str) -> str:
    """What a folder or label becomes in a prompt: underscores to spaces, composed Unicode (macOS stores it decomposed)."""
    return unicodedata.normalize("NFC", label).replace("_", " ").strip()


def places_of(names: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """Return where each of `names` stands among other class names, None where none of them means the same class."""
    index = {class_name(name): i for i, name in enumerate(among)}
    return [index.get(class_name(name)) for name in names]


def role_of(split: str) -> str | None:
    """ "Validation" -> "val"; None for a word that names no role."""
    return next((role for role, words in ROLES.items() if split.strip().lower() in words), None)


def from_rows(
    name: str, where: str, rows: Sequence[Row], classes: Sequence[str] | None = None, notes: Sequence[str] = ()
) -> Dataset:
    """A data set of rows whose labels are words, or numbers without gaps.

    Args:
        name: what reports call it.
        where: how error messages call the source.
        rows: at least two classes; roles of all rows or of none.
        classes: the names of labels "0", "1", …; None where labels are words, or numbers that nobody named.
        notes: what the reader left out.

    Raises:
        UserError: no row, one class, labels with gaps, one image twice.
    """
    if not rows:
        raise UserError(f"{where} lists no image")
    numbers = all(row.label.isdecimal() for row in rows)
    if classes is not None or numbers:
        names, index = _numbered(where, rows, classes)
    else:
        words = sorted({row.label for row in rows})
        names, index = [class_name(word) for word in words], {word: i for i, word in enumerate(words)}
        refuse_duplicates(names, lambda a, b: f"labels {words[a]!r} and {words[b]!r} in {where}")
    if len(names) < 2:
        raise UserError(f"{where} has one class, {names[0]!r}: give it at least two")
    notes = [*notes]
    seen: dict[str, Row] = {}
    roles: dict[str | None, list[Item]] = {None: [], "train": [], "val": [], "test": []}
    for row in rows:
        if (before := seen.setdefault(row.name, row)) is not row:
            if (before.label, before.role) == (row.label, row.role):
                continue
            was, now = (f"{r.label!r}" + (f" in {r.role}" if r.role else "") for r in (before, row))
            raise UserError(f"{where} lists {row.name} twice, as {was} and as {now}: keep one")
        roles[row.role].append(Item(index[row.label], row.name, row.source))
    if len(seen) < len(rows):
        notes.append(f"images listed twice, left out once: {len(rows) - len(seen)}")
    unsplit, train, val, test = (tuple(items) for items in roles.values())
    if unsplit and (train or val or test):
        raise UserError(f"{where} gives some images a split and others none: {unsplit[0].name} is the first without")
    if unsplit:
        return Dataset(name, tuple(names), unsplit, notes=tuple(notes))
    if val and not test:
        return Dataset(name, tuple(names), train, (), val, notes=(*notes, "tested on val: there is no split named test"))
    return Dataset(name, tuple(names), train, val, test or None, notes=tuple(notes))


def _numbered(where: str, rows: Iterable[Row], classes: Sequence[str] | None) -> tuple[list[str], dict[str, int]]:
    """Names and indices of labels "0", "1", …, each of which must occur unless `classes` says how many there are."""
    if bad := next((row for row in rows if not row.label.isdecimal()), None):
        raise UserError(f"{where} has label {bad.label!r} at {bad.name}: its classes are numbered from 0")
    index = {row.label: int(row.label) for row in rows}
    top = max(index.values()) if classes is None else len(classes) - 1
    if unknown := sorted(i for i in index.values() if i > top):
        raise UserError(f"{where} has label {unknown[0]}, but there are {top + 1} class names, for labels 0 to {top}")
    if classes is not None:
        names = [class_name(c) for c in classes]
        refuse_duplicates(names, lambda a, b: f"classes {a} and {b} of {where}")
        return names, index
    used = set(index.values())
    gap = next((i for i in range(top + 1) if i not in used), None)
    if gap is not None:
        raise UserError(
            f"{where}: labels have a gap, {gap} is never used and {top} is: number the classes 0 to n-1, or write words"
        )
    return [str(i) for i in range(top + 1)], index


def refuse_duplicates(names: Sequence[str], tell: Callable[[int, int], str]) -> None:
    """Raise UserError if two classes have one name; `tell` says which two, by index."""
    for name, count in Counter(names).items():
        if count > 1:
            first = names.index(name)
            raise UserError(f"{tell(first, names.index(name, first + 1))} both mean the class {name!r}: rename one")


def check_training(dataset: Dataset) -> None:
    """Raise UserError unless shots can be drawn of each class and accuracy be measured on each."""
    if not dataset.train:
        raise UserError(f"{dataset.name} has no training image: no split in it is called train")
    have = Counter(item.label for item in dataset.train)
    for label, name in enumerate(dataset.classes):
        if not have[label]:
            raise UserError(f"{dataset.name}: class {name!r} has no training image: add some, or remove the class")
        if dataset.test is None and have[label] < 2:
            raise UserError(f"{dataset.name}: class {name!r} has one image: it takes two, one to train on and one to test on")
    check_test(dataset)


def check_test(dataset: Dataset, items: Sequence[Item] | None = None) -> None:
    """Raise UserError unless each class has an image among `items`, or, by default, those that accuracy is measured on."""
    if items is None:
        items = dataset.tested
    tested = {item.label for item in items}
    if untested := [name for label, name in enumerate(dataset.classes) if label not in tested]:
        more = f" (nor have {len(untested) - 1} others)" if len(untested) > 1 else ""
        raise UserError(f"{dataset.name}: class {untested[0]!r} has no test image{more}: add some, or remove the class")
