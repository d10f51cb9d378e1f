"""A CSV, TSV or Parquet file that lists images: one row an image, its path, its label, and its split if the file has one."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading import Reading
from .base import Dataset, Row, from_rows
from .columns import find_columns, role_in

__all__ = ["ENDINGS", "read"]

ENDINGS = (".csv", ".tsv", ".parquet")


def read(file: Path, how: Reading) -> Dataset:
    """The images that `file` lists; paths are absolute, or start from its folder.

    Args:
        file: its first row names the columns.
        how: which columns hold what, where their names are not the usual ones.

    Raises:
        UserError: a file that cannot be read, a column that is missing, an empty cell, a split of no known name, a file that is
            listed and not there; or what `from_rows` refuses.
    """
    names, records = _parquet(file) if file.suffix.lower() == ".parquet" else _text(file)
    columns = find_columns(str(file), names, how)
    rows = []
    for number, record in enumerate(records, 2):
        cell = {kind: str(record[name]).strip() if record[name] is not None else "" for kind, name in columns.items()}
        if empty := [columns[kind] for kind, value in cell.items() if not value]:
            raise UserError(f"{file}, row {number}: {empty[0]} is empty")
        role = role_in(f"{file}, row {number}", columns["split"], cell["split"]) if "split" in cell else None
        rows.append(Row(role, cell["label"], cell["image"], file.parent / cell["image"]))
    missing = [row for row in rows if isinstance(row.source, Path) and not row.source.is_file()]
    if missing:
        raise UserError(
            f"{file}: {len(missing)} of {len(rows)} images are missing, the first is {missing[0].source}"
            f" (paths start from {file.parent})"
        )
    return from_rows(file.stem, str(file), rows)


def _text(file: Path) -> tuple[Sequence[str], Iterable[Mapping[str, Any]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            lines = list(csv.reader(opened, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not a readable table in UTF-8: {error}") from error
    if not lines:
        raise UserError(f"{file} is empty: its first row names the columns, each other row an image")
    names, *rows = lines
    for number, row in enumerate(rows, 2):
        if row and len(row) != len(names):
            raise UserError(f"{file}, row {number}: {len(row)} cells, but the first row names {len(names)} columns")
    return names, [dict(zip(names, row, strict=True)) for row in rows if row]


def _parquet(file: Path) -> tuple[Sequence[str], Iterable[Mapping[str, Any]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{file}: Parquet needs pyarrow: pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} is not a readable Parquet file: {str(error).splitlines()[0]}") from error
    return table.column_names, table.to_pylist()
