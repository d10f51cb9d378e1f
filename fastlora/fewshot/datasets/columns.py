"""Which column of a source holds the image, the label and the split: the one the user names, or one of the usual names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from ..reading import Reading
from .base import role_of

__all__ = ["find_columns", "role_in", "usual"]

# The names a column may have, whatever their case; the first that is there counts.
USUAL = {
    "image": ("path", "image", "img", "file", "filename", "filepath", "image_path", "file_name"),
    "label": ("label", "class", "category", "target", "class_name"),
    "split": ("split", "set", "subset", "role"),
}


def usual(kind: str, names: Sequence[str]) -> str | None:
    """The one of `names` that usually holds the image, the label or the split."""
    folded = {name.strip().lower(): name for name in names}
    return next((folded[name] for name in USUAL[kind] if name in folded), None)


def find_columns(where: str, names: Sequence[str], how: Reading) -> dict[str, str]:
    """ "image", "label" and, where there is one, "split" -> the name of its column.

    Raises:
        UserError: no such column; the message says what there is.
    """
    own = how.columns()
    found = {}
    for kind in USUAL:
        if (name := own.get(kind)) is not None:
            if name not in names:
                raise UserError(f"{where} has no column {name!r} (--{kind}-column): it has {', '.join(names)}")
        elif (name := usual(kind, names)) is None:
            if kind == "split":
                continue
            raise UserError(
                f"{where} has no column for the {kind}: it has {', '.join(names)};"
                f" name one {' or '.join(USUAL[kind][:2])}, or say which by --{kind}-column"
            )
        found[kind] = name
    return found


def role_in(where: str, column: str, cell: Any) -> str:
    """The role that a cell of the split column names.

    Raises:
        UserError: it names none.
    """
    role = role_of(str(cell))
    if role is None:
        raise UserError(f"{where}: {column} is {cell!r}: write train, val or test")
    return role
