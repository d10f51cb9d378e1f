"""Data sets: a folder with one sub-folder a class, a known set in CoOp's layout, or scikit-learn's digits.

Nothing is decoded here: a data set is a list of names. What was left out, and why, is counted in `notes`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError

__all__ = ["KNOWN", "CoopSet", "Dataset", "Item", "find", "load"]

TEMPLATE = "a photo of a {}."
IMAGE_ENDINGS = (".apng", ".avif", ".bmp", ".dib", ".gif", ".ico", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm",
                 ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")  # fmt: skip
VAL_NAMES = ("val", "valid", "validation")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SIDE = 64


@dataclasses.dataclass(frozen=True)
class Item:
    """One image: its class, a name that is unique in its data set, and a file or an RGB array, uint8 (h, w, 3)."""

    label: int
    name: str
    source: Path | np.ndarray


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
        flip: whether a mirrored image still belongs to its class.
        notes: what was left out, one line each.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Item, ...]
    val: tuple[Item, ...] = ()
    test: tuple[Item, ...] | None = None
    template: str = TEMPLATE
    flip: bool = True
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CoopSet:
    """A set in the layout of CoOp: folder names in use, the split file and the folder its paths start from."""

    folders: tuple[str, ...]
    split: str
    images: str
    template: str = TEMPLATE


# Only sets that the tests read completely; the layouts of the others differ in these values alone.
KNOWN = {"caltech101": CoopSet(("caltech-101", "Caltech101"), "split_zhou_Caltech101.json", "101_ObjectCategories")}


def load(data: str, root: Path = Path("data")) -> Dataset:
    """The data set that `data` names: "digits", a known set under `root`, or a path to a folder.

    Raises:
        UserError: no such folder, a class without images, or a split file that does not fit its images.
    """
    place, known = find(data, root)
    if place is None:
        return _digits()
    return _folder(place) if known is None else _coop(known, KNOWN[known], place)


def find(data: str, root: Path) -> tuple[Path | None, str | None]:
    """Where the data set is (None for digits), and which known set it is, if one; looks at two files at most.

    Raises:
        UserError: there is no such data set.
    """
    if data == "digits":
        return None, None
    if data in KNOWN:
        known = KNOWN[data]
        places = [root / folder for folder in known.folders] + [root]
        for place in places:
            if (place / known.split).is_file():
                return place, data
        looked = ", ".join(str(place / known.split) for place in places)
        raise UserError(f"data set {data}: no split file (looked for {looked}): --root names the folder that holds it")
    folder = Path(data).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise UserError(f"DATA {data} {what}: give a folder with one sub-folder a class, or {', '.join(['digits', *KNOWN])}")
    return folder, next((name for name, known in KNOWN.items() if (folder / known.split).is_file()), None)


def class_name(folder: str) -> str:
    """What a folder's name becomes in a prompt: underscores to spaces, composed Unicode (macOS stores it decomposed)."""
    return unicodedata.normalize("NFC", folder).replace("_", " ").strip()


def _folder(folder: Path) -> Dataset:
    left_out: Counter[str] = Counter()
    notes = []
    below = _class_folders(folder, Counter())  # counted where classes are read
    roles = {name.lower(): path for name, path in below.items()}
    val = next((roles[name] for name in VAL_NAMES if name in roles), None)
    test: tuple[Item, ...] | None = None
    val_items: list[Item] = []
    if "train" in roles and ("test" in roles or val):
        tested = roles.get("test", val)
        assert tested is not None
        classes, train = _read_classes(folder, roles["train"], None, left_out)
        test = tuple(_read_classes(folder, tested, classes, left_out)[1])
        if tested is val:
            notes.append(f"tested on {val.name}: there is no folder named test")
        elif val:
            val_items = _read_classes(folder, val, classes, left_out)[1]
        if others := sorted(set(below.values()) - {roles["train"], tested, val}):
            notes.append(f"folders beside train and {tested.name}, left out: {len(others)}, the first is {others[0].name}")
    else:
        classes, train = _read_classes(folder, folder, None, left_out)
    names = tuple(class_name(c) for c in classes)
    for name, count in Counter(names).items():
        if count > 1:
            same = [c for c in classes if class_name(c) == name]
            raise UserError(f"folders {same[0]!r} and {same[1]!r} in {folder} both mean the class {name!r}: rename one")
    notes += [f"{what}: {count}" for what, count in left_out.items()]
    return Dataset(folder.resolve().name, names, tuple(train), tuple(val_items), test, notes=tuple(notes))


def _read_classes(base: Path, folder: Path, expected: list[str] | None, left_out: Counter[str]) -> tuple[list[str], list[Item]]:
    """Class folders of `folder` in order of name, and their images; names relative to `base`."""
    found = _class_folders(folder, left_out)
    if expected is None:
        if len(found) < 2:
            loose = any(p.suffix.lower() in IMAGE_ENDINGS for p in folder.iterdir())
            what = "images but no" if loose and not found else f"{len(found)}"
            raise UserError(f"{folder} holds {what} class folders: give it one sub-folder a class, at least two")
        expected = sorted(found)
    elif unknown := sorted(set(found) - set(expected)):
        raise UserError(f"class folder {folder / unknown[0]} has no counterpart in {base / 'train'}")
    items = []
    for label, name in enumerate(expected):
        if name not in found:
            continue
        files = sorted(_image_files(found[name], left_out))
        if not files:
            raise UserError(f"class folder {found[name]} holds no image: add some, or remove the folder")
        items += [Item(label, path.relative_to(base).as_posix(), path) for path in files]
    return expected, items


def _class_folders(folder: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Sub-folders by name; hidden ones, and links that lead back up, are not classes."""
    above = {folder.resolve(), *folder.resolve().parents}
    found = {}
    for path in _entries(folder):
        if path.name.startswith((".", "__MACOSX")) or not path.is_dir():
            if path.is_symlink() and not path.exists():
                left_out["links that lead nowhere or in a circle, left out"] += 1
            continue
        if path.resolve() in above:
            left_out["links that lead nowhere or in a circle, left out"] += 1
            continue
        found[path.name] = path
    return found


def _image_files(folder: Path, left_out: Counter[str], above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below `folder` that are named like images; links are followed, circles are not."""
    above = above | {folder.resolve()}
    for path in _entries(folder):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if any(up.is_relative_to(path.resolve()) for up in above):
                left_out["links that lead nowhere or in a circle, left out"] += 1
            else:
                yield from _image_files(path, left_out, above)
        elif not path.is_file():
            left_out["links that lead nowhere or in a circle, left out"] += 1
        elif path.suffix.lower() in IMAGE_ENDINGS:
            yield path
        else:
            left_out["files that are not images, left out"] += 1


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error


def _coop(name: str, known: CoopSet, place: Path) -> Dataset:
    split_file, images = place / known.split, place / known.images
    try:
        split = json.loads(split_file.read_text(encoding="utf-8"))
        classes: dict[int, str] = {}
        roles: dict[str, list[Item]] = {}
        for role in ("train", "val", "test"):
            roles[role] = [_coop_item(images, classes, *row) for row in split[role]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{split_file} is not a split file of CoOp's layout: {error!r}") from error
    if sorted(classes) != list(range(len(classes))):
        raise UserError(f"{split_file}: labels are not 0 to {len(classes) - 1}")
    every = [item for items in roles.values() for item in items]
    missing = [item.source for item in every if not os.path.isfile(item.source)]  # type: ignore[arg-type]
    if missing:
        raise UserError(f"data set {name}: {len(missing)} of {len(every)} images are missing, the first is {missing[0]}")
    names = tuple(classes[label].replace("_", " ") for label in sorted(classes))
    train, val, test = (tuple(roles[role]) for role in ("train", "val", "test"))
    return Dataset(name, names, train, val, test, known.template)


def _coop_item(images: Path, classes: dict[int, str], path: str, label: Any, name: str) -> Item:
    if classes.setdefault(int(label), name) != name:
        raise ValueError(f"label {label} is both {classes[int(label)]!r} and {name!r}")
    return Item(int(label), path, images / path)


def _digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8×8, enlarged once; the first half for shots, the second for the test."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    items = []
    for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        large = small.resize((DIGIT_SIDE, DIGIT_SIDE), Image.Resampling.BICUBIC).convert("RGB")
        items.append(Item(int(label), f"digit {i}", np.asarray(large)))
    half = len(items) // 2
    return Dataset("digits", DIGITS, tuple(items[:half]), (), tuple(items[half:]), "a photo of the digit {}.", flip=False)
