"""Sets of Hugging Face's `datasets`: one saved by save_to_disk, one on the hub, or a folder that load_dataset reads."""

from __future__ import annotations

import dataclasses
import importlib.util
import socket
import urllib.parse
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading import Reading
from .base import Dataset, Lazy, Row, from_rows, role_of
from .columns import find_columns, role_in

__all__ = ["is_saved", "read"]


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or all((folder / f).is_file() for f in ("state.json", "dataset_info.json"))


def read(name: str, how: Reading) -> Dataset:
    """The set `name`: a folder, a name on the hub, or name:configuration.

    Raises:
        UserError: `datasets` is not installed; the set cannot be had, found or read; or what `from_rows` refuses.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{name}: Hugging Face sets need the package datasets: pip install datasets")
    import datasets as library

    opened = _open(library, name)
    splits: dict[str, Any] = dict(opened) if isinstance(opened, dict) else {"": opened}
    roles = {split: role_of(split) for split in splits}
    notes = []
    if len(splits) > 1 and how.split_column is None:
        if others := [split for split, role in roles.items() if role is None]:
            notes.append(f"splits that are not train, validation or test, left out: {', '.join(others)}")
        splits = {split: rows for split, rows in splits.items() if roles[split]}
        if not splits:
            raise UserError(f"hf:{name} has the splits {', '.join(others)}: none is called train, validation or test")
    rows: list[Row] = []
    unlabelled = 0
    columns_of = {split: find_columns(_where(name, split), list(part.column_names), _with_image(library, part, how))
                  for split, part in splits.items()}  # fmt: skip
    names = {split: getattr(part.features[columns_of[split]["label"]], "names", None) for split, part in splits.items()}
    # splits that number their classes in different ways have only the words in common
    by_words = any(own != names[next(iter(splits))] for own in names.values())
    for split, part in splits.items():
        where, columns, own = _where(name, split), columns_of[split], names[split]
        # a column named set or role means something else beside splits that have names
        by = columns.get("split") if len(splits) == 1 or how.split_column else None
        images = _undecoded(library, where, part, columns["image"])
        labels = _column(part, columns["label"])
        said = _column(part, by) if by else [None] * len(labels)
        for i, (label, cell) in enumerate(zip(labels, said, strict=True)):
            if label is None or (isinstance(label, int) and label < 0):  # how the hub marks tests whose labels are secret
                unlabelled += 1
                continue
            if not isinstance(label, (int, str)):
                raise UserError(f"{where}: {columns['label']} holds {type(label).__name__}s: name a column of words or numbers")
            if by_words and own is None and isinstance(label, int):
                raise UserError(f"{where}: its classes are numbers, those of another split have names: name a column of words")
            label = own[label] if by_words and own is not None and isinstance(label, int) else label
            role = roles[split] if by is None else role_in(f"{where}, row {i}", by, cell)
            rows.append(
                Row(role, str(label).strip(), f"{split} {i}".strip(), Lazy(partial(_image, images, columns["image"], i)))
            )
    if unlabelled:
        notes.append(f"images without a label, left out: {unlabelled}")
    short = Path(name.partition(":")[0]).name
    return from_rows(short, f"hf:{name}", rows, None if by_words else next(iter(names.values())), notes)


def _where(name: str, split: str) -> str:
    return f"hf:{name}" + (f", {split}" if split else "")


def _open(library: Any, name: str) -> Any:
    """The Dataset, or DatasetDict, of this name."""
    folder = Path(name).expanduser()
    try:
        if is_saved(folder):
            return library.load_from_disk(str(folder))
        if folder.is_dir():
            return library.load_dataset(str(folder))
        path, _, configuration = name.partition(":")
        _reach(name)
        return library.load_dataset(path, configuration or None)
    except (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"hf:{name} cannot be loaded: {first}") from error


def _reach(name: str) -> None:
    """Raise UserError at once where the hub has no address, which the library would ask for again and again."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise UserError(
            f"hf:{name} is no folder here, and {host} cannot be reached ({error.strerror or error}): give a folder that"
            " save_to_disk wrote, or set HF_HUB_OFFLINE=1 for a set that was loaded before"
        ) from error


def _with_image(library: Any, part: Any, how: Reading) -> Reading:
    """`how`, with the one column of images where the user named none."""
    images = [name for name, feature in part.features.items() if isinstance(feature, library.Image)]
    return how if how.image_column is not None or len(images) != 1 else dataclasses.replace(how, image_column=images[0])


def _undecoded(library: Any, where: str, part: Any, column: str) -> Any:
    """`part` with nothing but its images, as bytes."""
    feature = part.features[column]
    part = part.with_format(None).select_columns([column])
    if isinstance(feature, library.Image):
        return part.cast_column(column, library.Image(decode=False))
    if getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise UserError(f"{where}: column {column} holds no images but {feature}: name another by --image-column")
    return part


def _column(part: Any, name: str) -> list[Any]:
    return list(part.with_format(None).select_columns([name])[name])


def _image(images: Any, column: str, i: int) -> bytes:
    cell = images[i][column]
    if isinstance(cell, bytes):
        return cell
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
