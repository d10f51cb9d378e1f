"""Data sets from where people keep them; one small reader a source, and all give the same `Dataset`.

What lies at a path is told by what is there: a folder with one sub-folder a class, a table of paths and labels, WebDataset
tars, a set that Hugging Face's `datasets` saved, or one of the paper's 11. What a library keeps has its name before it:
`hf:NAME`, `torchvision:NAME`. Nothing is decoded here: a data set is a list of names. What was left out, and why, is counted in
`notes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..reading import Reading
from . import coop, digits, folder, huggingface, table, tars, torchvision
from .base import Dataset, Item, Lazy, check_test, check_training, class_name
from .held_out import hold_out
from .known import KNOWN, identify, locate
from .naming import with_remarks
from .torchvision import from_torch
from .words import prompts, read_class_names, rename

__all__ = [
    "KNOWN", "Dataset", "Item", "Lazy", "Reading", "check_test", "check_training", "class_name", "find", "from_torch", "load",
    "locate", "prompts",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Found:
    """What DATA names: what it is, how to read it, and whether it has columns that a user may name."""

    kind: str
    read: Callable[[Reading], Dataset]
    columns: bool = False


def load(data: str, root: Path = Path("data"), how: Reading | None = None) -> Dataset:
    """The data set that `data` names.

    Args:
        data: "digits", a known set under `root`, "hf:NAME", "torchvision:NAME", or a path: a folder a class, a table (.csv,
            .tsv, .parquet), WebDataset tars (a file, a folder, a pattern in braces), a saved Hugging Face set.
        root: the folder that holds known sets and torchvision's.
        how: class names and columns of one's own, a share held out for validation.

    Raises:
        UserError: whatever is missing or does not fit, and what would be right.
    """
    how = how or Reading()
    names = None if how.class_names is None else read_class_names(Path(how.class_names).expanduser())
    found = find(data, root)
    if how.columns() and not found.columns:
        option = next(iter(how.columns()))
        raise UserError(f"--{option}-column: DATA {data} is {found.kind}, which has no columns")
    dataset = found.read(how)
    if names is not None and how.class_names is not None:
        dataset = rename(dataset, names, Path(how.class_names))
    path = Path(data).expanduser()
    dataset = with_remarks(dataset, path if path.is_dir() else path.parent)
    return hold_out(dataset, how.validation) if how.validation else dataset


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
    library, _, name = data.partition(":")
    if library == "hf" and name:
        return Found("a Hugging Face set", lambda how: huggingface.read(name, how), columns=True)
    if library == "torchvision" and name:
        return Found("a set of torchvision", lambda how: torchvision.read(name, root))
    if shards := tars.find(data):
        return Found("WebDataset tars", lambda how: tars.read(data, shards, how), columns=True)
    path = Path(data).expanduser()
    if path.is_file() and path.suffix.lower() in table.ENDINGS:
        return Found("a table of paths and labels", lambda how: table.read(path, how), columns=True)
    if not path.is_dir():
        what = "is a file, not a folder, a table or a tar" if path.is_file() else "does not exist"
        raise UserError(
            f"DATA {data} {what}: give a folder with one sub-folder a class, a table ({', '.join(table.ENDINGS)}), tars (.tar),"
            f" hf:NAME, torchvision:NAME, or {', '.join(['digits', *KNOWN])}"
        )
    if huggingface.is_saved(path):
        return Found("a saved Hugging Face set", lambda how: huggingface.read(data, how), columns=True)
    if known := identify(path):
        return _known(known, path)
    return Found("a folder a class", lambda how: folder.read(path))


def _known(name: str, place: Path) -> Found:
    return Found(f"{KNOWN[name].title} in {place}", lambda how: coop.read(name, place))
