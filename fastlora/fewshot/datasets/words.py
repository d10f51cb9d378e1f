"""Text files that people write by hand: class names and prompts, one a line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..recipe import OWN
from .base import UNNAMED, Dataset, class_name, refuse_duplicates

__all__ = ["decode", "prompts", "read_class_names", "read_lines", "read_templates", "rename"]


def decode(path: Path) -> str:
    """The text of a file, UTF-8 with or without a byte-order mark.

    Raises:
        UserError: no such file, or another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is not UTF-8 text (line {line}, byte 0x{data[error.start]:02x}): save it as UTF-8") from error


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a file that are not empty, without space around them; `what` they are goes into messages.

    Raises:
        UserError: no line, or a file that cannot be read as UTF-8.
    """
    lines = [line.strip() for line in decode(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: it should hold {what}, one a line")
    return lines


def read_templates(path: Path) -> tuple[str, ...]:
    """Prompts, one a line, each with {} once where the class name goes; lines that begin with # are comments.

    Raises:
        UserError: a line without {}, two equal lines, no line.
    """
    templates: list[str] = []
    for number, line in enumerate(decode(path).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.count("{}") != 1 or line.count("{") != 1 or line.count("}") != 1:
            raise UserError(f"{path}, line {number}: a template holds {{}} once, where the class name goes, got {line!r}")
        if line in templates:
            raise UserError(f"{path}, line {number}: {line!r} stands there twice")
        templates.append(line)
    if not templates:
        raise UserError(f"{path} holds no template: write one a line, as: a photo of a {{}}.")
    return tuple(templates)


def prompts(given: str | Sequence[str]) -> tuple[str, ...]:
    """Templates as a user gives them: each a prompt with {}, or a file of prompts; or "own", alone.

    Raises:
        UserError: neither, or a file that `read_templates` refuses.
    """
    if given in (OWN, [OWN]):
        return (OWN,)
    found: list[str] = []
    for one in [given] if isinstance(given, str) else given:
        if "{" in one or "}" in one:
            found.append(one)
        elif Path(one).is_file():
            found += read_templates(Path(one))
        else:
            raise UserError(
                f"template must hold {{}} once, where the class name goes, or name a file of such lines, got {one!r}"
            )
    return tuple(found)


def read_class_names(path: Path) -> list[str] | dict[str, str]:
    """Class names, one a line, in the order of the labels; or, where every line has a tab, label, tab, name: a mapping."""
    lines = read_lines(path, "class names")
    pairs = [line.split("\t") for line in lines]
    if all(len(pair) == 1 for pair in pairs):
        return lines
    if bad := [line for line, pair in zip(lines, pairs, strict=True) if len(pair) != 2]:
        raise UserError(f"{path}: expected a label, a tab and a class name, as in its other lines, got {bad[0]!r}")
    mapping = {class_name(label): name for label, name in pairs}
    if len(mapping) < len(pairs):
        raise UserError(f"{path} gives two names to one label: keep one")
    return mapping


def rename(dataset: Dataset, names: Sequence[str] | dict[str, str], where: Path) -> Dataset:
    """`dataset` with other class names.

    Raises:
        UserError: another number of names than of classes, a class without a name, one name for two classes.
    """
    if isinstance(names, dict):
        if unnamed := [name for name in dataset.classes if name not in names]:
            raise UserError(f"{where} has no line for class {unnamed[0]!r} of {dataset.name}")
        names = [names[name] for name in dataset.classes]
    if len(names) != len(dataset.classes):
        raise UserError(f"{where} holds {len(names)} class names, {dataset.name} has {len(dataset.classes)} classes")
    classes = tuple(class_name(name) for name in names)
    refuse_duplicates(classes, lambda a, b: f"two lines of {where}")
    notes = tuple(note for note in dataset.notes if not note.startswith(UNNAMED))
    return dataclasses.replace(dataset, classes=classes, notes=notes)
