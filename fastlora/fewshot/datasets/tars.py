"""WebDataset tars: cat/0001.jpg beside cat/0001.cls (or .json with a label) is one image; a tar is a part of the set.

Tars are read at random, not streamed: the place of each image is found once, and its bytes are read when they are needed.
Nothing but Python's tarfile takes part, so the webdataset package need not be installed.
"""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading import Reading
from .base import IMAGE_ENDINGS, Dataset, Lazy, Row, from_rows, role_of
from .columns import role_in, usual
from .words import read_lines

__all__ = ["find", "read"]

LABELS = ("cls", "label", "class", "label.txt", "cls.txt")
# What CLIP Benchmark's sets name their classes in, in the order of the labels.
NAMES = "classnames.txt"
WHOLE = "give tars that are not compressed, on a disk of this machine"


def find(data: str) -> list[Path] | None:
    """The tars that `data` names: a file, a pattern as train-{000..009}.tar, or a folder that holds some; None if it is none.

    Raises:
        UserError: a compressed or distant tar, or one of a pattern that is not there.
    """
    if re.match(r"(https?|s3|gs|pipe):", data) or data.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise UserError(f"DATA {data}: {WHOLE}")
    if data.endswith(".tar"):
        paths = [Path(name).expanduser() for name in expand(data)]
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(f"DATA {data}: {len(missing)} of {len(paths)} tars are missing, the first is {missing[0]}")
        return paths
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return None
    below = [folder, *sorted(path for path in folder.iterdir() if role_of(path.name) and path.is_dir())]
    return [tar for place in below for tar in sorted(place.glob("*.tar"))] or None


def expand(pattern: str) -> list[str]:
    """ "a-{08..10}.tar" -> a-08.tar, a-09.tar, a-10.tar; "{a,b}.tar" -> a.tar, b.tar."""
    pieces: list[list[str]] = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        if numbers := re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece):
            first, last = numbers.groups()
            pieces.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        else:
            pieces.append(piece[1:-1].split(",") if piece.startswith("{") and "," in piece else [piece])
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def read(data: str, paths: list[Path], how: Reading) -> Dataset:
    """The images in `paths`. Their split is a word of a tar's or its folder's name (train-000.tar, test/0.tar), or `how` says.

    Raises:
        UserError: a damaged tar, an image without a label; or what `from_rows` refuses.
    """
    place = Path(data).expanduser()
    base = place if place.is_dir() else place.parent
    rows: list[Row] = []
    without = 0
    for path in paths:
        shard = path.relative_to(base).as_posix() if path.is_relative_to(base) else path.name
        for key, sample in _samples(path):
            ending = _image(sample, how)
            if ending is None:
                without += 1
                continue
            where = f"{path}, {key}"
            label = _label(where, sample, how)
            role = _role(shard) if how.split_column is None else _own_role(where, sample, how.split_column)
            offset, size = sample[ending]
            rows.append(Row(role, label, f"{shard}/{key}", Lazy(partial(_bytes, path, offset, size))))
    name = place.name if place.is_dir() else re.sub(r"[-_.]*\{.*?\}", "", place.name).removesuffix(".tar") or "tars"
    notes = [f"samples without an image, left out: {without}"] if without else []
    numbers = all(row.label.isdecimal() for row in rows)
    return from_rows(name, data, rows, _names([base, *(path.parent for path in paths)]) if rows and numbers else None, notes)


def _names(folders: Iterable[Path]) -> list[str] | None:
    """What numbers mean, from the lists beside the tars, which must agree.

    Raises:
        UserError: they do not.
    """
    lists = {file: read_lines(file, "class names") for folder in folders if (file := folder / NAMES).is_file()}
    for file, names in lists.items():
        first, wanted = next(iter(lists.items()))
        if names != wanted:
            pairs = (pair for pair in zip(wanted, names, strict=False) if pair[0] != pair[1])
            was, now = next(pairs, (len(wanted), len(names)))
            raise UserError(f"{first} has {was!r} where {file} has {now!r}: give labels that are words, or one list")
    return next(iter(lists.values()), None)


Sample = dict[str, Any]


def _samples(path: Path) -> Iterator[tuple[str, Sample]]:
    """The samples of a tar: ending -> (offset, size) of an image, or what a small file says."""
    samples: dict[str, Sample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                ending = ending.lower()
                sample = samples.setdefault(f"{folder}{slash}{stem}".removeprefix("./"), {})
                if _is_image(ending):
                    sample[ending] = member.offset_data, member.size
                else:
                    opened = tar.extractfile(member)
                    assert opened is not None
                    sample[ending] = opened.read()
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is not a readable tar ({error}): {WHOLE}") from error
    yield from samples.items()


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in IMAGE_ENDINGS


def _image(sample: Sample, how: Reading) -> str | None:
    if how.image_column is not None:
        wanted = how.image_column.lower().removeprefix(".")
        return wanted if wanted in sample and _is_image(wanted) else None
    return next((ending for ending in sample if _is_image(ending)), None)


def _label(where: str, sample: Sample, how: Reading) -> str:
    said = _json(where, sample)
    if how.label_column is not None:
        value = _named(sample, said, how.label_column)
    else:
        ending = next((ending for ending in LABELS if ending in sample), None)
        key = usual("label", list(said))
        value = sample[ending] if ending is not None else said.get(key) if key is not None else None
    label = "" if value is None else _text(where, value)
    if not label:
        wanted = f".{LABELS[0]} or .json with label" if how.label_column is None else f"{how.label_column} (--label-column)"
        raise UserError(f"{where} has no label: {wanted}; it has {', '.join(sample)}")
    return label


def _named(sample: Sample, said: dict[str, Any], name: str) -> Any:
    ending = name.lower().removeprefix(".")
    return sample[ending] if isinstance(sample.get(ending), bytes) else said.get(name)


def _text(where: str, value: Any) -> str:
    try:
        return (value.decode("utf-8") if isinstance(value, bytes) else str(value)).strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: its label is not UTF-8 text") from error


def _json(where: str, sample: Sample) -> dict[str, Any]:
    try:
        said = json.loads(sample.get("json", b"{}"))
    except ValueError as error:
        raise UserError(f"{where}.json is not JSON: {error}") from error
    return said if isinstance(said, dict) else {}


def _role(shard: str) -> str | None:
    words = [word for word in re.split(r"[^A-Za-z]+", shard) if word]
    return next((role for word in reversed(words) if (role := role_of(word))), None)


def _own_role(where: str, sample: Sample, name: str) -> str:
    value = _named(sample, _json(where, sample), name)
    if value is None:
        raise UserError(f"{where} has no {name} (--split-column): it has {', '.join(sample)}")
    return role_in(where, name, _text(where, value))


def _bytes(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)
