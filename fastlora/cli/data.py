"""`fastlora data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console

__all__ = ["data"]


@app.command()
def data(
    root: Annotated[Path, typer.Option(help="Folder that holds the known sets.")] = Path("data"),
) -> None:
    """The paper's data sets: which are here, and what to put where for the others."""
    from rich.table import Table

    from ..fewshot.datasets import KNOWN, locate

    table = Table("DATA", "classes", "train / val / test", "here")
    table.columns[1].justify = table.columns[2].justify = "right"
    missing: dict[str, tuple[str, ...]] = {}
    for name, known in KNOWN.items():
        found = locate(name, root)
        if found.missing:
            missing[name] = found.missing
        sizes = " / ".join(f"{size:,}" if size else "–" for size in known.sizes)
        table.add_row(name, f"{known.classes:,}", sizes, f"not complete in {root}" if found.missing else str(found.place))
    out = console()
    out.print(table)
    for name, pieces in missing.items():
        out.print(f"[bold]{name}[/bold]: {'; '.join(pieces)}", soft_wrap=True, highlight=False)
    out.print("digits comes with scikit-learn; a folder with one sub-folder a class, or a table, is named by its path")
