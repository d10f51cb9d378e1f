"""The tests marked gpu, in a process of their own; only files that hold such tests are collected."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import ROOT

from .items import Item, Row
from .run import Run

__all__ = ["suite_items"]

# How many tests run side by side: Triton's compiler, not the GPU, is what they wait for.
STOPPING = 8.0  # seconds kept for ending them and for what they said
# A group of its own, so that Ctrl-C reaches the tests alone; in the worker's session, so that they end with it.
GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))
# What a shell starts in the background ignores Ctrl-C, and so would pytest.
PYTEST = (
    "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main(sys.argv[1:]))"
)
MARK = re.compile(r"^(pytestmark = pytest\.mark\.gpu|@pytest\.mark\.gpu|.*marks=pytest\.mark\.gpu)", re.MULTILINE)
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def _stopped(process: subprocess.Popen[str]) -> str:
    """Interrupt pytest, which then says what failed so far; end its workers too, which would disturb what is timed next."""
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: a worker that is not told keeps the others waiting
    try:
        output, _ = process.communicate(timeout=STOPPING - 2)
    except subprocess.TimeoutExpired:
        output = ""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return output
    return output or process.communicate()[0]


def files(root: Path = ROOT) -> list[str]:
    """The files with tests marked gpu: to import all others would take half a minute."""
    found = sorted(path for path in root.joinpath("tests").glob("test_*.py") if MARK.search(path.read_text(encoding="utf-8")))
    return [str(path.relative_to(root)) for path in found]


def suite_items(part: str, which: str, limit: float) -> list[Item]:
    """The tests that the marks `which` select, as one item of at most `limit` seconds."""
    work = functools.partial(run_tests, which, limit)
    about = {"case": f"tests ({which})", "contestant": "fastlora triton"}
    return [Item(part, f"tests ({which})", limit, work, spare=True, about=about)]


def run_tests(which: str, limit: float, run: Run) -> Iterator[Row]:
    """Run the tests, stopped after `limit` seconds; refused where one failed or none passed."""
    # A warning that another version of some library gives says nothing about a kernel.
    options = ["-m", which, "-v", "-rN", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]  # a package that is not here must not cost the other files
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PYTEST, *files(ROOT), *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **GROUP,
    )  # fmt: skip
    ending = "stopped at the limit"
    try:
        output, _ = process.communicate(timeout=min(limit, max(1.0, run.left() - STOPPING)))
        ending = f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        output = _stopped(process)
    # one line a test; a summary at the end would be lost with a run that is stopped
    seen = [match[1] for line in output.splitlines() if "::" in line and (match := OUTCOME.search(line))]
    counts = {name.lower(): seen.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    seconds = round(time.monotonic() - start, 1)
    said = f"{', '.join(f'{n} {name}' for name, n in counts.items())}; {ending}, {seconds} s"
    row: Row = {
        "row": "tests",
        "which": which,
        "counts": counts,
        "ending": ending,
        "seconds": seconds,
        "output": output[-20000:],
    }
    green = counts["failed"] == 0 and counts["passed"] > 0
    if counts["error"]:  # a file that wants a package which is not here
        row["noted"] = [said]
    if not green:
        print(output[-6000:], flush=True)
    yield row if green else row | {"refused": [said]}
