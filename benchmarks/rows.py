"""Raw rows, one JSON object a line, each on disk as soon as it is known. No torch: what watches a benchmark reads them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ON_GPUS = RESULTS / "gpu"


def append(path: Path, row: dict[str, Any]) -> None:
    """Append one row; a value that JSON does not know is written as its text."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, default=str) + "\n")


class Rows:
    """The rows of one run: a run that is stopped keeps what it measured.

    Args:
        header: what the rows behind it were measured on.
        more: whether to add to what the file holds, under a header of its own.
    """

    def __init__(self, path: Path, header: dict[str, Any], more: bool = False) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not more:
            path.write_text("")
        self.add({"row": "run", **header})

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, as `append`."""
        append(self.path, row)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `Rows` wrote, the run's header first; a line that a killed run left unfinished is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def complete_lines(path: Path) -> None:
    """Cut off a line that a killed process has left unfinished, so that the next row begins one."""
    if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
