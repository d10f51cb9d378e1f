"""A folder with one sub-folder a class, or with train/, val/ and test/ of such."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .base import IMAGE_ENDINGS, Dataset, Item, class_name, places_of, refuse_duplicates, role_of
from .ours import is_ours

__all__ = ["class_folders", "class_items", "read"]

LOST = "links that lead nowhere or in a circle, left out"
OURS = "folders of runs, left out"


def read(folder: Path) -> Dataset:
    """The data set in `folder`.

    Raises:
        UserError: fewer than two classes, a class without images, two folders of one name, a folder that cannot be read.
    """
    left_out: Counter[str] = Counter()
    notes = []
    beside: Counter[str] = Counter()
    below = class_folders(folder, beside)
    roles = {role: path for path in below.values() if (role := role_of(path.name))}
    val, test = roles.get("val"), roles.get("test")
    tested = test or val
    if "train" not in roles or tested is None:
        classes, train = _read_classes(folder, folder, None, left_out)
        val_items, test_items = [], None
    else:
        left_out[OURS] = beside[OURS]
        classes, train = _read_classes(folder, roles["train"], None, left_out)
        test_items = tuple(_read_classes(folder, tested, classes, left_out)[1])
        val_items = _read_classes(folder, val, classes, left_out)[1] if val and test else []
        if not test:
            notes.append(f"tested on {tested.name}: there is no folder named test")
        if others := sorted(set(below.values()) - {roles["train"], tested, val}):
            notes.append(f"folders beside train and {tested.name}, left out: {len(others)}, the first is {others[0].name}")
    notes += [f"{what}: {count}" for what, count in left_out.items() if count]
    return Dataset(folder.resolve().name, tuple(classes), tuple(train), tuple(val_items), test_items, notes=tuple(notes))


def _read_classes(base: Path, folder: Path, expected: list[str] | None, left_out: Counter[str]) -> tuple[list[str], list[Item]]:
    """The classes of `folder`, in order of its folders' names or as `expected`, and their images, named from `base` on."""
    found = sorted(class_folders(folder, left_out).items())
    names = [class_name(name) for name, _ in found]
    refuse_duplicates(names, lambda a, b: f"folders {found[a][0]!r} and {found[b][0]!r} in {folder}")
    if expected is None:
        if len(found) < 2:
            loose = any(p.suffix.lower() in IMAGE_ENDINGS for p in folder.iterdir())
            what = "images but no" if loose and not found else f"{len(found)}"
            raise UserError(f"{folder} holds {what} class folders: give it one sub-folder a class, at least two")
        expected = names
    labelled = []
    for label, (_, path) in zip(places_of(names, expected), found, strict=True):
        if label is None:
            raise UserError(f"class folder {path} has no counterpart in {base / 'train'}")
        labelled.append((label, path))
    return expected, [item for label, path in sorted(labelled) for item in class_items(base, path, label, left_out)]


def class_folders(folder: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Sub-folders by name; hidden ones, links that lead back up, and what fastlora wrote are not classes."""
    above = {folder.resolve(), *folder.resolve().parents}
    found = {}
    for entry in _entries(folder):
        if entry.name.startswith((".", "__MACOSX")) or not _is_folder(entry):
            if entry.is_symlink() and not os.path.exists(entry.path):
                left_out[LOST] += 1
        elif entry.is_symlink() and Path(entry.path).resolve() in above:
            left_out[LOST] += 1
        elif is_ours(Path(entry.path)):
            left_out[OURS] += 1
        else:
            found[entry.name] = Path(entry.path)
    return found


def class_items(base: Path, folder: Path, label: int, left_out: Counter[str]) -> list[Item]:
    """The images of one class, below `folder` at any depth, in order of path; names relative to `base`.

    Raises:
        UserError: there is none.
    """
    files = sorted(Path(path) for path in _image_files(folder, left_out))
    if not files:
        raise UserError(f"class folder {folder} holds no image: add some, or remove the folder")
    return [Item(label, path.relative_to(base).as_posix(), path) for path in files]


def _image_files(folder: str | Path, left_out: Counter[str], above: frozenset[Path] = frozenset()) -> Iterator[str]:
    """Files below `folder` that are named like images; links are followed, circles and what fastlora wrote are not."""
    above = above | {Path(folder).resolve()}
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if _is_folder(entry):
            if entry.is_symlink() and any(up.is_relative_to(Path(entry.path).resolve()) for up in above):
                left_out[LOST] += 1
            elif is_ours(Path(entry.path)):
                left_out[OURS] += 1
            else:
                yield from _image_files(entry.path, left_out, above)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out[LOST] += 1
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_ENDINGS:
            yield entry.path
        else:
            left_out["files that are not images, left out"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # only a link costs a look at the disk; DirEntry raises on a link to itself
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from error
