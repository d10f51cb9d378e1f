"""Benchmarks run as a user runs them, and what their rows say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import read_rows
from waiting import HANG

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run_benchmark(*arguments: str, folder: Path) -> list[dict[str, Any]]:
    """Run a benchmark in a process of its own, as a user does, and return the rows of every file that it wrote."""
    # a benchmark is timed by one process at a time, whatever the suite that starts it runs under
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=BENCHMARKS.parent, timeout=HANG
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["contestant"] for row in rows if "median_ms" in row}
