"""The tables and pictures of docs/results.md, and README's short table, from the committed rows of sweeps.

    python benchmarks/sweeps.py NAME=SWEEP…

copies the rows of finished sweeps' folders (sweep_caltech101=runs/caltech101) to benchmarks/results/ and draws their pictures,
docs/NAME.png, docs/NAME-2.png, …; `python benchmarks/pages.py` then makes the tables.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlora.fewshot.sweep.figures import figures
from fastlora.fewshot.sweep.render import duration
from fastlora.fewshot.sweep.results import read_rows
from fastlora.fewshot.sweep.tables import by_shots, markdown, tables

HOME = Path(__file__).resolve().parents[1]
ROWS = HOME / "benchmarks" / "results"
# The sweeps that the pages show, by the stem of their rows; those whose pictures they show.
SWEEPS = tuple(sorted(path.stem for path in ROWS.glob("sweep_*.jsonl")))
DRAWN = tuple(name for name in SWEEPS if name in ("sweep_caltech101", "sweep_ablation"))


def rows_of(name: str) -> list[dict[str, Any]]:
    """The committed rows of a sweep."""
    return read_rows(ROWS / f"{name}.jsonl")


def text_of(name: str) -> str:
    """The tables of a sweep as Markdown, and how long its runs took."""
    rows = rows_of(name)
    parts = [f"{table.title}:\n\n{markdown(table)}" for table in tables(rows)]
    return "\n\n".join([*parts, f"{time_of(rows)}."])


def time_of(rows: Sequence[dict[str, Any]]) -> str:
    """Runs and the time that they took: of older rows only the training's is known."""
    runs = {row.get("run", number): row for number, row in enumerate(rows)}  # one may stand in several tables
    return f"{len(runs)} runs, {duration(sum(row.get('seconds', row['train_seconds'] or 0.0) for row in runs.values()))} in all"


def short() -> str:
    """README's table: 16 shots alone."""
    rows = rows_of("sweep_digits") + rows_of("sweep_caltech101")
    return markdown(by_shots([row for row in rows if row["shots"] == 16], published=False))


def draw(name: str, folder: Path) -> list[Path]:
    """Draw the pictures of a sweep into `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        drawn = figures(rows_of(name), Path(temporary))
        targets = [folder / (f"{name}.png" if i == 0 else f"{name}-{i + 1}.png") for i in range(len(drawn))]
        for (_, source), target in zip(drawn, targets, strict=True):
            shutil.copyfile(source, target)
    return targets


def main() -> None:
    """Take rows and draw pictures."""
    for name, _, folder in (given.partition("=") for given in sys.argv[1:]):
        shutil.copyfile(Path(folder) / "rows.jsonl", ROWS / f"{name}.jsonl")
    for name in DRAWN:
        print(*draw(name, HOME / "docs"), sep="\n")


if __name__ == "__main__":
    main()
