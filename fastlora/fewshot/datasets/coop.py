"""The 11 known sets: a split file of CoOp's, FGVC Aircraft's lists, or ImageNet's folders."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ..errors import UserError
from .base import Dataset, Item, class_name, refuse_duplicates
from .folder import class_folders, class_items
from .known import GENERATED, KNOWN, KnownSet
from .words import read_lines, read_synsets

__all__ = ["read"]

ROLES = ("train", "val", "test")


def read(name: str, place: Path) -> Dataset:
    """The known set `name`, whose pieces lie in `place`.

    Raises:
        UserError: lists that are damaged, name missing images, or do not fit one another.
    """
    known = KNOWN[name]
    if name == "imagenet":
        classes, roles, notes = _imagenet(place)
    elif known.split is None:
        classes, roles, notes = _aircraft(place)
    else:
        classes, roles, notes = _split(known, place)
    items = [item for role in roles.values() for item in role]
    # ImageNet's were listed just now
    missing = [] if name == "imagenet" else [item.source for item in items if not os.path.isfile(item.source)]  # type: ignore[arg-type]
    if missing:
        most, where = f"{len(missing)} of {len(items)} images are missing", place / known.images
        raise UserError(f"data set {name}: {most}, the first is {missing[0]}: put them below {where}")
    generated = (place / GENERATED).is_file()
    if generated:
        notes.append(f"generated images in the layout of {name}, not the real ones")
    elif (sizes := tuple(len(roles[role]) for role in ROLES)) != known.sizes:
        here, published = (" + ".join(map(str, s)) for s in (sizes, known.sizes))
        notes.append(f"{here} images for training, validation and test, published are {published}")
    train, val, test = (tuple(roles[role]) for role in ROLES)
    return Dataset(
        name, tuple(classes), train, val, test, own_template=known.own_template, generated=generated, notes=tuple(notes)
    )


Lists = tuple[list[str], dict[str, list[Item]], list[str]]


def _split(known: KnownSet, place: Path) -> Lists:
    """A split file: {"train": [[path, label, class name], …], "val": …, "test": …}."""
    assert known.split is not None
    file, images = place / known.split, place / known.images
    names: dict[int, str] = {}
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
        roles = {role: [_split_item(images, names, *row) for row in split[role]] for role in ROLES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a split file of CoOp's layout: {error!r}") from error
    gap = next((i for i in range(len(names)) if i not in names), None)
    if gap is not None:
        raise UserError(f"{file}: labels are not 0 to {len(names) - 1}, {gap} is missing")
    if len(names) < 2:
        raise UserError(f"{file} has {len(names)} classes: give it at least two")
    classes = [names[label] for label in range(len(names))]
    refuse_duplicates(classes, lambda a, b: f"labels {a} and {b} in {file}")
    return classes, roles, []


def _split_item(images: Path, names: dict[int, str], path: str, label: Any, name: str) -> Item:
    if names.setdefault(int(label), class_name(name)) != class_name(name):
        raise ValueError(f"label {label} is both {names[int(label)]!r} and {name!r}")
    return Item(int(label), path, images / path)


def _aircraft(place: Path) -> Lists:
    """variants.txt, one class a line, and images_variant_{train,val,test}.txt: "1025794 707-320" for the image 1025794.jpg."""
    classes = read_lines(place / "variants.txt", "class names")
    refuse_duplicates(classes, lambda a, b: f"lines {a + 1} and {b + 1} of {place / 'variants.txt'}")
    label = {name: i for i, name in enumerate(classes)}
    roles: dict[str, list[Item]] = {}
    for role in ROLES:
        file = place / f"images_variant_{role}.txt"
        roles[role] = []
        for number, line in enumerate(read_lines(file, "images"), 1):
            image, _, variant = line.partition(" ")
            if variant not in label:
                raise UserError(f"{file}, line {number}: {variant!r} is no line of {place / 'variants.txt'}")
            roles[role].append(Item(label[variant], f"{image}.jpg", place / "images" / f"{image}.jpg"))
    return classes, roles, []


def _imagenet(place: Path) -> Lists:
    """train/n01440764/… and val/n01440764/…; names in classnames.txt as CoOp has it, or in Kaggle's LOC_synset_mapping.txt."""
    mapping, train, val = (piece.find(place) for piece in KNOWN["imagenet"].needs())
    assert mapping is not None and train is not None and val is not None
    names = read_synsets(mapping)
    left_out: Counter[str] = Counter()
    folders = {role: class_folders(path, left_out) for role, path in (("train", train), ("test", val))}
    if len(folders["train"]) < 2:
        raise UserError(f"{train} holds {len(folders['train'])} class folders: put each class in a folder n01440764, …")
    if not folders["test"]:
        raise UserError(f"{val} holds no class folder: sort its images into folders n01440764, … as in {train}")
    wnids = sorted(folders["train"])
    for role, path in (("train", train), ("test", val)):
        if unnamed := sorted(set(folders[role]) - (set(names) & set(wnids))):
            raise UserError(f"class folder {path / unnamed[0]} has no name in {mapping}, or no folder in {train}")
    roles: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for label, wnid in enumerate(wnids):
        for role, below in folders.items():
            if wnid in below:
                roles[role] += class_items(place, below[wnid], label, left_out)
    classes = [names[wnid] for wnid in wnids]
    notes = [f"{what}: {count}" for what, count in left_out.items()]
    if mapping.name != "classnames.txt":
        notes.append(f"class names are the first of each line of {mapping.name}; the paper's are CoOp's classnames.txt")
    # a few names of ImageNet stand for two classes, in the paper's list too
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        notes.append(f"names of more than one class: {len(twice)}, the first is {twice[0]}")
    return classes, roles, notes
