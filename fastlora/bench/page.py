"""One HTML page that a browser shows without a server: every table, every picture as inlined SVG."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import Any

from ..fewshot.errors import UserError
from .plots import PLOTS
from .rows import Row
from .table import Table
from .tables import everything

__all__ = ["figures", "page", "save", "svg"]

STYLE = """
body { margin: 0 auto; max-width: 1120px; padding: 36px 28px 64px; color: #1f2933; background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 44px 0 10px; } .soft { color: #64748b; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th { text-align: left; font-weight: 600; color: #64748b; vertical-align: bottom; }
td, th { padding: 4px 14px 4px 0; border-bottom: 1px solid #e2e8f0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } figure { margin: 28px 0 0; }
"""

# By this a page is known as one that may be written anew.
OURS = "<meta name='generator' content='fastlora bench'>"
NOTE = (
    "Ratios have both sides from one run; ± is the largest distance of a run from the median, or of a step where there is one "
    "run. What computed wrong results has no time: see <i>Not timed</i>."
)


def figures(rows: list[Row]) -> dict[str, Any]:
    """Name -> figure of every picture that the rows have something for."""
    made = {name: draw(rows) for name, draw in PLOTS.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def svg(figure: Any, description: str | None = None) -> str:
    """The same text each time: no date, ids that do not change; the description travels in its metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Description": description})
    return buffer.getvalue()


def page(rows: list[Row], title: str) -> str:
    """The page as text."""
    tables: list[Table] = everything(rows)
    drawn = {name: _inline(svg(figure), name) for name, figure in figures(rows).items()}
    body = "".join(f"<figure>{picture}</figure>" for picture in drawn.values())
    parts = [table.html() for table in tables]
    heading = f"<h1>{html.escape(title)}</h1><p class='soft'>{NOTE}</p>"
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>{OURS}<title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>{heading}{parts[0] if parts else ''}{body}{''.join(parts[1:])}</html>"
    )


def _inline(picture: str, name: str) -> str:
    """An <svg> whose ids are its own: matplotlib gives every figure the same ones."""
    picture = picture[picture.index("<svg") :]
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", picture)


def save(rows: list[Row], folder: Path, title: str) -> list[Path]:
    """Write page.html and each picture as PNG; all of it is made before the first file is written.

    Raises:
        UserError: files of these names are in `folder` that are not from here.
    """
    path = folder / "page.html"
    there = [name for name in (path.name, *(f"{name}.png" for name in PLOTS)) if (folder / name).exists()]
    if there and not (path.is_file() and OURS in path.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"--out {folder} holds {', '.join(there)}, but no page of fastlora bench: choose another folder")
    text, drawn = page(rows, title), figures(rows)
    pictures = {}
    for name, figure in drawn.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        pictures[folder / f"{name}.png"] = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    for picture, data in pictures.items():
        picture.write_bytes(data)
    return [path, *pictures]
