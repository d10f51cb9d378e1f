"""Benchmarks run as a user runs them, and what their rows say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rows import read_rows
from waiting import HANG

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def alone() -> dict[str, str]:
    """The environment of a benchmark: it is timed by itself, and in its own repository, whatever starts the suite."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "GIT_"))}


def without_interpreter() -> dict[str, str]:
    """The same for what compiles kernels: the interpreter is chosen when Triton is imported."""
    return {k: v for k, v in alone().items() if k != "TRITON_INTERPRET"}


def run_benchmark(*arguments: str, folder: Path, cwd: Path = BENCHMARKS.parent) -> list[dict[str, Any]]:
    """Run a benchmark in a process of its own, as a user does, and return the rows of every file that it wrote."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=alone(), cwd=cwd, timeout=HANG)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def copy_of_tree(folder: Path) -> None:
    """What `pytest benchmarks/` reads of the repository, in a repository of its own, where nothing is untracked."""
    shutil.copytree(BENCHMARKS, folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "local", "results"))
    for name in (".gitignore", "pyproject.toml"):
        shutil.copy(BENCHMARKS.parent / name, folder)
    _git(folder, "init", "--quiet")
    _git(folder, "add", ".")


def changed(folder: Path) -> str:
    """The files that differ from what `copy_of_tree` made, but for ignored ones."""
    return _git(folder, "ls-files", "--others", "--modified", "--deleted", "--exclude-standard")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, env=alone(), capture_output=True, text=True, check=True)
    return done.stdout


def names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["contestant"] for row in rows if "median_ms" in row}
