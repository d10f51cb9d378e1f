"""`fastlora bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..fewshot.errors import UserError
from .app import app, console

__all__ = ["bench"]


@app.command()
def bench(
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help="A .jsonl file of benchmark rows, or a folder of them.")],
    out: Annotated[Path | None, typer.Option(metavar="PAGE", help="Folder for page.html and the pictures.")] = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "fastlora, measured",
) -> None:
    """Show benchmark rows as tables; with --out also as pictures and one HTML page. Measures nothing: `make bench` does."""
    from ..bench.page import save
    from ..bench.rows import read
    from ..bench.tables import everything

    found = read(rows)
    tables = everything(found)
    if not tables:
        raise UserError(f"ROWS {rows} holds no row that fastlora bench knows: it reads what benchmarks/ write")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    screen = console()
    for table in tables:
        screen.print(table.rich())
        screen.print()
    if out is not None:
        for path in save(found, out, title):
            screen.print(f"wrote {path}", highlight=False, soft_wrap=True)
