"""The tables and the figure of README and docs, made from the committed rows; nothing in them is written by hand.

    python benchmarks/pages.py            makes them
    python benchmarks/pages.py --check    says which differ, and fails if one does (tests/test_figures.py does the same)

A page holds a table between two marks, `<!-- NAME -->` and `<!-- end of NAME -->`. NAME is a key of BLOCKS below: who adds a
table adds a line there.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import engines
import expected.tables
import exports
import options_table
import soak
import sweeps
from fastlora.bench import plots, tables
from fastlora.bench.page import svg
from fastlora.bench.rows import MODEL, Row, read
from fastlora.bench.table import Table
from fastlora.bench.targets import targets

HOME = Path(__file__).resolve().parents[1]
RESULTS = HOME / "benchmarks" / "results"
FIGURE = HOME / "docs" / "overview.svg"
MARK = re.compile(r"<!-- (?!end of )([^>]+?) -->\n(.*?)<!-- end of \1 -->", re.DOTALL)
MISSING = "Not yet measured."


@cache
def cpu_rows() -> list[Row]:
    """What benchmarks/cpu.py measured."""
    return read(RESULTS / "cpu") if (RESULTS / "cpu").is_dir() else []


def _cpu(make: Callable[[list[Row]], Table | None]) -> Callable[[Path], str]:
    def block(page: Path) -> str:
        table = make(cpu_rows())
        return MISSING if table is None else table.markdown()

    return block


def _sweep(name: str, page: Path) -> str:
    return sweeps.text_of(name)


def _steps(model: str, classes: int) -> Callable[[Path], str]:
    def make(rows: list[Row]) -> Table | None:
        found = [row for row in rows if row["row"] == "step" and (row["model"], row["classes"]) == (model, classes)]
        return tables.steps(found, one=True)

    return _cpu(make)


def _warm_up(page: Path) -> str:
    """A line of the list: what was taken before the timed steps, and how many pages those still had to wait for."""
    found = [row for row in cpu_rows() if row["row"] == "step" and "warm_up" in row]
    if not found:
        return (
            "* These rows were warmed up by one small step alone: a timed step may hold page faults that later ones have not."
        )
    steps = " or ".join(map(str, sorted({row["warm_up"] for row in found})))
    faults = [n for row in found for n in row["page_faults"] if n is not None]
    still = f" Page faults in a timed step: {statistics.median(faults):.0f} (median; at most {max(faults)})." if faults else ""
    return (
        f"* Timed is the steady state of a training run, which has thousands of steps: the first {steps} steps (or chunks) of "
        f"each contestant are slower, as the system maps and clears their memory (page faults), and are not counted.{still}"
    )


# name -> the text of the block, for the page it stands on
BLOCKS: dict[str, Callable[[Path], str]] = {
    "few-shot table": lambda page: sweeps.short(),
    **{name: partial(_sweep, name) for name in sweeps.SWEEPS},
    "options table": lambda page: options_table.table(options_table.rows_so_far()),
    "exports table": lambda page: exports.table(),
    "engines table": lambda page: engines.table(),
    "soak": lambda page: soak.text(),
    "machine": _cpu(tables.machine),
    "targets": _cpu(targets),
    "layers": _cpu(tables.ops),
    "not timed": _cpu(tables.not_timed),
    "savings": _cpu(tables.savings),
    "kept memory": _cpu(tables.kept_memory),
    "memory": _cpu(tables.memory),
    "scaling": _cpu(tables.scaling),
    "warm-up": _warm_up,
    "agreement": _cpu(tables.agreement),
    "overview": _cpu(tables.overview),
    "expected on an H100": lambda page: expected.tables.text(),
    **{f"step of {m}, {n} classes": _steps(m, n) for m in ("mini", MODEL) for n in (10, 100, 1000)},
}


# Made by another script, which has a test of its own: not figures from rows, but what was tried.
ELSEWHERE = {"hosts table": "tests/hosts_table.py"}


def render(page: Path) -> str:
    """The page's text with every block made anew, but for those made elsewhere.

    Raises:
        KeyError: a block that nothing makes.
    """

    def block(found: re.Match[str]) -> str:
        if found[1] in ELSEWHERE:
            return found[0]
        return f"<!-- {found[1]} -->\n{BLOCKS[found[1]](page)}\n<!-- end of {found[1]} -->"

    return MARK.sub(block, page.read_text(encoding="utf-8"))


def pages() -> list[Path]:
    """README and docs, those that hold a block."""
    every = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
    return [path for path in every if MARK.search(path.read_text(encoding="utf-8"))]


def figure_values() -> str:
    """What the figure shows, as it is kept in the figure's own description."""
    return json.dumps(plots.overview(cpu_rows()), ensure_ascii=True, sort_keys=True)


def figure_agrees() -> bool:
    """Whether the committed figure is that of the rows: pixels differ between versions of matplotlib, values do not."""
    import html

    return not cpu_rows() or (FIGURE.is_file() and figure_values() in html.unescape(FIGURE.read_text(encoding="utf-8")))


def main() -> int:
    """Make or check; 1 if a check found a difference."""
    if "--check" in sys.argv[1:]:
        wrong = [str(path) for path in pages() if render(path) != path.read_text(encoding="utf-8")]
        wrong += [] if figure_agrees() else [str(FIGURE)]
        print(f"not that of the rows: {', '.join(wrong)}" if wrong else "all pages are those of the rows")
        return bool(wrong)
    for path in pages():
        path.write_text(render(path), encoding="utf-8")
    if cpu_rows() and (figure := plots.hero(cpu_rows())) is not None:
        FIGURE.write_text(svg(figure, figure_values()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
