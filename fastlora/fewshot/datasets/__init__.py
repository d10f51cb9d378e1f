"""Data sets from where people keep them; one small reader a source, and all give the same `Dataset`.

A folder with one sub-folder a class, a table of paths and labels, the 11 sets of the paper, or scikit-learn's digits. Nothing
is decoded here: a data set is a list of names. What was left out, and why, is counted in `notes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from . import coop, digits, folder, table
from .base import Dataset, Item, Lazy, check_training
from .known import KNOWN, identify, locate
from .words import read_class_names, read_templates, rename

__all__ = ["KNOWN", "Dataset", "Item", "Lazy", "Reading", "check_training", "find", "load", "locate", "read_templates"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read DATA, beside its name and root; the defaults read every source that follows common habits.

    Args:
        class_names: a file with the names of the classes, one a line, or lines of label, tab, name.
    """

    class_names: Path | None = None


@dataclasses.dataclass(frozen=True)
class Found:
    """What DATA names: how to read it, once it is known to be there."""

    kind: str
    read: Callable[[Reading], Dataset]


def load(data: str, root: Path = Path("data"), how: Reading | None = None) -> Dataset:
    """The data set that `data` names.

    Args:
        data: "digits", a known set under `root`, or a path to a folder or a table (.csv, .tsv, .parquet).
        root: the folder that holds known sets.
        how: class names of one's own.

    Raises:
        UserError: whatever is missing or does not fit, and what would be right.
    """
    how = how or Reading()
    names = None if how.class_names is None else read_class_names(how.class_names)
    dataset = find(data, root).read(how)
    return dataset if names is None or how.class_names is None else rename(dataset, names, how.class_names)


def find(data: str, root: Path) -> Found:
    """What `data` names; looks at a few files and imports nothing heavy.

    Raises:
        UserError: there is no such data set, or a piece of it is missing.
    """
    if data == "digits":
        return Found("scikit-learn's digits", lambda how: digits.read())
    if data in KNOWN:
        located = locate(data, root)
        if located.missing:
            raise UserError(f"data set {data} is not complete: {'; '.join(located.missing)} (--root names the folder {root})")
        assert located.place is not None
        return _known(data, located.place)
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() in table.ENDINGS:
        return Found("a table of paths and labels", lambda how: table.read(path))
    if not path.is_dir():
        what = "is a file, not a folder or a table" if path.is_file() else "does not exist"
        raise UserError(
            f"DATA {data} {what}: give a folder with one sub-folder a class, a table ({', '.join(table.ENDINGS)}), or"
            f" {', '.join(['digits', *KNOWN])}"
        )
    if name := identify(path):
        return _known(name, path)
    return Found("a folder a class", lambda how: folder.read(path))


def _known(name: str, place: Path) -> Found:
    return Found(f"{KNOWN[name].title} in {place}", lambda how: coop.read(name, place))
