"""A table as text, and figures as text: for a terminal, Markdown and HTML alike."""

from __future__ import annotations

import dataclasses
import html
import statistics
from collections.abc import Sequence
from typing import Any

from .rows import spread

__all__ = ["NONE", "Table", "percent", "ratio", "ratios", "seconds", "size"]

NONE = "–"  # not measured


@dataclasses.dataclass(frozen=True)
class Table:
    """heads of the columns and rows of cells, the first `text` left-aligned; note: a line below."""

    title: str
    heads: tuple[str, ...]
    cells: Sequence[tuple[str, ...]]
    note: str = ""
    text: int = 1

    def without(self, head: str) -> Table:
        """The same table with one column left out."""
        at = self.heads.index(head)
        return dataclasses.replace(
            self, heads=self.heads[:at] + self.heads[at + 1 :], cells=[row[:at] + row[at + 1 :] for row in self.cells]
        )

    def markdown(self) -> str:
        """Without the title."""
        lines = ["| " + " | ".join(self.heads) + " |", "|" + "---|" * self.text + "---:|" * (len(self.heads) - self.text)]
        lines += ["| " + " | ".join(row) + " |" for row in self.cells]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])

    def html(self) -> str:
        """A <table> with its title and note."""

        def row(cells: tuple[str, ...], tag: str) -> str:
            classes = [""] * self.text + [' class="n"'] * (len(cells) - self.text)
            return "".join(f"<{tag}{c}>{html.escape(t)}</{tag}>" for c, t in zip(classes, cells, strict=True))

        body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in self.cells)
        note = f"<p class='soft'>{html.escape(self.note)}</p>" if self.note else ""
        return f"<h2>{html.escape(self.title)}</h2><table><tr>{row(self.heads, 'th')}</tr>{body}</table>{note}"

    def rich(self) -> Any:
        """A rich.table.Table, as narrow as it can be: names of methods in one piece, for a terminal of 80 columns."""
        from rich import box
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title, caption=self.note or None, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
            pad_edge=False,
        )  # fmt: skip
        for i, head in enumerate(self.heads):
            table.add_column(head, justify="right" if i >= self.text else "left", overflow="fold", no_wrap=head == "method")
        for cells in self.cells:
            table.add_row(*cells)
        return table


def seconds(value: float | None) -> str:
    """Milliseconds as readable text."""
    if value is None:
        return NONE
    return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.3g} ms"


def size(value: float | None) -> str:
    """Bytes as readable text."""
    if value is None:
        return NONE
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def ratio(value: float | None) -> str:
    """A ratio as text."""
    return NONE if value is None else f"{value:.2f}"


def ratios(values: Sequence[float], digits: int = 2, times: str = "") -> str:
    """Their median, and ± the largest distance of one from it; times: what stands behind the median."""
    if not values:
        return NONE
    noise = spread(values)
    return f"{statistics.median(values):.{digits}f}{times}" + (f" ± {100 * noise:.0f} %" if noise else "")


def percent(value: float | None) -> str:
    """A share as text."""
    return NONE if value is None else f"{100 * value:.0f} %"
