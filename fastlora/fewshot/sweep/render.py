"""What a sweep shows: its tables in the terminal, and index.html with tables and figures, the figures as PNG beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from ..report.html import section, table, text
from ..report.style import STYLE
from ..runfolder import atomic
from .figures import figures
from .tables import Row, Table, source, tables

__all__ = ["duration", "render", "summary"]

PICTURES = "figure img { background: #fff; border-radius: 10px; width: 100%; } .scroll td, .scroll th { white-space: nowrap; }"


def render(rows: Sequence[Row], title: str, out: Path, console: Console) -> None:
    """Print the tables of `rows`; write index.html and the figures to `out`."""
    made = tables(rows)
    for one in made:
        console.print(one.title, highlight=False)
        shown = RichTable(*one.heads)
        for column in shown.columns[1:]:
            column.justify = "right"
        for row in one.rows:
            shown.add_row(*row)
        console.print(shown)
    lines = summary(rows)
    for line in lines:
        console.print(line, highlight=False)
    with atomic(out / "index.html") as temporary:
        temporary.write_text(_page(title, lines, made, figures(rows, out)), encoding="utf-8")
    console.print(f"tables and figures: {(out / 'index.html').resolve()}", soft_wrap=True, highlight=False)


def summary(rows: Sequence[Row]) -> list[str]:
    """What one must know to read the tables: one line each."""
    runs = {row["run"]: row for row in rows}  # one may stand in several tables
    lines = [f"{len(runs)} runs, {duration(sum(row['seconds'] for row in runs.values()))} in all, on {_listed(rows, 'device')}"]
    if generated := sorted({row["data"] for row in rows if row["generated"]}):
        lines.append(
            f"generated images, not the real ones, and no measure of anything but the machinery: {', '.join(generated)}"
        )
    lines.append(f"torch {_listed(rows, 'torch')}, open_clip {_listed(rows, 'open_clip_torch')}, {_listed(rows, 'precision')}")
    lines.append(f"the paper's figures: {source()}")
    return lines


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _listed(rows: Sequence[Row], name: str) -> str:
    return ", ".join(sorted({str(row[name]) for row in rows}))


def _page(title: str, lines: Sequence[str], made: Sequence[Table], drawn: Sequence[tuple[str, Path]]) -> str:
    parts = [f"<h1>{text(title)}</h1>", *(f'<div class="soft">{text(line)}</div>' for line in lines)]
    for what, path in drawn:
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img alt="{text(what)}" src="data:image/png;base64,{data}">'
        parts.append(section(path.stem, what, "", f"<figure>{image}</figure>"))
    for number, one in enumerate(made):
        cells = [[text(cell) for cell in row] for row in one.rows]
        shown = table([text(head) for head in one.heads], cells, range(2, len(one.heads)))
        parts.append(section(f"table-{number + 1}", one.title, "", f"<div class='scroll'>{shown}</div>"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{PICTURES}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
