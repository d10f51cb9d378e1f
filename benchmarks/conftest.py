"""`pytest benchmarks/ --benchmark-only`: the profile, the ceilings of this run, raw rows, and a table of ratios at the end.

--profile quick     four to five minutes on two cores (default)
--profile full      all sizes: CPU hours for 1000 classes, minutes on a GPU
--profile tiny      every benchmark at a size that proves nothing but that it runs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastlora.bench.rows import read
from fastlora.bench.tables import everything
from recorder import Recorder

# `python -m pytest` puts the repository's root on sys.path, where the folder kernels/ hides PyPI's `kernels` from transformers.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
LOCAL = ROOT / "benchmarks" / "local"  # git ignores it, and nothing reads it: results/ holds what was measured on purpose


def pytest_addoption(parser: pytest.Parser) -> None:
    """--profile and --results."""
    group = parser.getgroup("fastlora")
    group.addoption("--profile", choices=("tiny", "quick", "full"), default="quick", help="how much is measured")
    group.addoption("--results", type=Path, default=LOCAL, help="folder for the raw rows")


def pytest_configure(config: pytest.Config) -> None:
    """The columns of pytest-benchmark's own tables: all of them need two lines of a terminal."""
    if hasattr(config.option, "benchmark_columns"):  # not under -p no:benchmark
        config.option.benchmark_columns = config.option.benchmark_columns or ["median", "iqr", "rounds"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module's `cases(profile, device)` gives the values of its `case`, outermost, so that a case's floor is timed first."""
    if "case" in metafunc.fixturenames:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        values = metafunc.module.cases(metafunc.config.getoption("--profile"), device)
        metafunc.parametrize("case", values, ids=lambda case: case.name.replace(" ", "_"))


_RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(scope="session")
def recorder(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """The session's rows; the file is made when the first benchmark runs."""
    config = request.config
    config.stash[_RECORDER] = Recorder(config.getoption("--profile"), config.getoption("--results"))
    yield config.stash[_RECORDER]


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The same tables as `fastlora bench`, what the gate said, and where the rows lie."""
    if (recorder := config.stash.get(_RECORDER, None)) is None:
        return
    rows = read(recorder.rows.path)
    screen = Console(file=terminalreporter._tw._file, width=terminalreporter._tw.fullwidth)
    screen.print()
    # targets speak of all sizes
    tables = {"tiny": [], "quick": [t for t in everything(rows) if t.title != "Targets"], "full": everything(rows)}
    for table in tables[config.getoption("--profile")]:
        screen.print(table.rich())
        screen.print()
    right = {(row["case"], row["contestant"]) for row in rows if "median_ms" in row}
    wrong = {(row["case"], row["contestant"]) for row in rows if "refused" in row}
    path = recorder.rows.path
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    screen.print(
        f"Gate: outputs and gradients of {len(right)} contestants agree with an fp64 truth,",
        f"so they were timed; {len(wrong)} do not and have no time.",
        f"Raw rows: {path}",
        "Pictures and a page of them:",
        f"fastlora bench {path} --out {path.parent / 'page'}",
        sep="\n", highlight=False, soft_wrap=True,
    )  # fmt: skip
