"""What a sweep shows: tables in the terminal, index.html with tables and figures, and the figures as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from .tables import tables

__all__ = ["render"]


def render(rows: Sequence[dict[str, Any]], title: str, out: Path, console: Console) -> None:
    """Print the tables of `rows`."""
    for table in tables(rows):
        shown = RichTable(*table.heads, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
