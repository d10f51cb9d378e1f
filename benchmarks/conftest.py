"""`pytest benchmarks/ --benchmark-only`: the profile, the ceilings of this run, raw rows, and a table of ratios at the end.

--profile quick     under three minutes on two cores (default)
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

from machine import RESULTS, read_rows
from recorder import Recorder
from tables import ratio_table

# `python -m pytest` puts the repository's root on sys.path, where the folder kernels/ hides PyPI's `kernels` from transformers.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]


def pytest_addoption(parser: pytest.Parser) -> None:
    """--profile and --results."""
    group = parser.getgroup("fastlora")
    group.addoption("--profile", choices=("tiny", "quick", "full"), default="quick", help="how much is measured")
    group.addoption("--results", type=Path, default=RESULTS, help="folder for the raw rows")


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


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The ratios, and where the rows lie."""
    if (recorder := config.stash.get(_RECORDER, None)) is not None:
        terminalreporter.write_line(ratio_table(read_rows(recorder.rows.path)))
        terminalreporter.write_line(f"\nraw rows: {recorder.rows.path}")
