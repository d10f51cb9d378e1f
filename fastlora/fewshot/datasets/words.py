"""Text files that people write by hand: class names and prompts, one a line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..recipe import OWN
from .base import WORDNET_ID, Dataset, class_name, refuse_duplicates

__all__ = ["decode", "prompts", "read_class_names", "read_lines", "read_synsets", "read_templates", "rename"]


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


def read_synsets(path: Path) -> dict[str, str]:
    """WordNet id -> class name, from lines as n01440764 tench: CoOp's classnames.txt, or Kaggle's LOC_synset_mapping.txt, of
    whose several names the first counts.

    Raises:
        UserError: another kind of line, or an id that stands there twice.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(read_lines(path, "class names"), 1):
        wnid, _, name = line.partition(" ")
        name = name.strip() if path.name == "classnames.txt" else name.split(",")[0].strip()
        if not re.fullmatch(WORDNET_ID, wnid) or not name or wnid in names:
            raise UserError(
                f"{path}, line {number}: expected a new WordNet id and a class name (n01440764 tench), got {line!r}"
            )
        names[wnid] = name
    return names


def read_class_names(path: Path) -> list[str] | dict[str, str]:
    """Class names, one a line, in the order of the labels; or a mapping: label, tab, name in every line, or WordNet id, space,
    name."""
    lines = read_lines(path, "class names")
    if all(re.match(f"{WORDNET_ID} ", line) for line in lines):
        return read_synsets(path)
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
    """`dataset` with other class names: by label, or one after another in the order that `lines_of` gives its labels.

    Raises:
        UserError: another number of names than of classes, a class without a name, one name for two classes, no plain order.
    """
    labels, notes = dataset.classes, list(dataset.notes)
    if isinstance(names, dict):
        if unnamed := [name for name in labels if name not in names]:
            raise UserError(f"{where} has no line for class {unnamed[0]!r} of {dataset.name}")
        classes = [class_name(names[label]) for label in labels]
    else:
        if len(names) != len(labels):
            raise UserError(f"{where} holds {len(names)} class names, {dataset.name} has {len(labels)} classes")
        line = lines_of(labels, where)
        classes = [class_name(names[i]) for i in line]
        first, last = line.index(0), line.index(len(line) - 1)
        order = "the order of the labels" if line == sorted(line) else "the labels' natural order"
        notes.append(f"names by {order}: {labels[first]!r} is {classes[first]!r}, … {labels[last]!r} is {classes[last]!r}")
    refuse_duplicates(classes, lambda a, b: f"two lines of {where}")
    return dataclasses.replace(dataset, classes=tuple(classes), notes=tuple(notes))


def lines_of(labels: Sequence[str], where: Path) -> list[int]:
    """Return which line of a list names each of `labels`: the same order, but "2" before "10" in numbered labels.

    Raises:
        UserError: labels sorted as text, among them numbers that are not all of one kind, so that their order is not plain.
    """
    as_given = list(range(len(labels)))
    natural = sorted(as_given, key=lambda i: [int(part) if part.isdecimal() else part for part in _parts(labels[i])])
    if natural == as_given or list(labels) != sorted(labels):  # labels that no reader sorted have an order of their own
        return as_given
    numbers = {label: [int(part) for part in _parts(label) if part.isdecimal()] for label in labels}
    shapes = {tuple(part for part in _parts(label) if not part.isdecimal()) for label in labels}
    if len(shapes) > 1 or {len(n) for n in numbers.values()} != {1} or len({n[0] for n in numbers.values()}) < len(labels):
        i = next(i for i in as_given if natural[i] != i)
        raise UserError(
            f"{where} names classes by their order, but {labels[i]!r} and {labels[natural[i]]!r} can be put in two orders:"
            " write lines of label, tab, name"
        )
    return sorted(as_given, key=natural.__getitem__)


def _parts(label: str) -> list[str]:
    """ "n-10" -> "n-", "10", "": text and digits by turns, text first."""
    return re.split(r"(\d+)", label)
