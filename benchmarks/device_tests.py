"""The tests marked gpu, run by device.py in a process of their own: what is wrong must be known before anything is timed."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time

from machine import ROOT
from run import Run

# How many tests run side by side: Triton's compiler, not the GPU, is what they wait for.
WORKERS = max(1, min(12, (os.cpu_count() or 1) - 2))
# What a shell starts in the background ignores Ctrl-C, and so would pytest.
PYTEST = (
    "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(pytest.main(sys.argv[1:]))"
)
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def _stopped(process: subprocess.Popen[str]) -> str:
    """Interrupt pytest, which then says what failed so far; end its workers too, which would disturb what is timed next."""
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: a worker that is not told keeps the others waiting
    try:
        output, _ = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        output = ""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return output
    return output or process.communicate()[0]


def run_tests(run: Run, limit: float, which: str) -> bool:
    """Run the tests that the marks `which` select, stopped after `limit` seconds; False if one failed or none passed."""
    # Files that need a package which is not here cannot be collected; the others must run all the same. A warning that
    # another version of some library gives says nothing about a kernel.
    options = ["-m", which, "-v", "-rN", "--tb=short", "-W", "default", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(WORKERS)]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", PYTEST, "tests", *options],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    ending = "stopped at the limit"
    try:
        output, _ = process.communicate(timeout=limit)
        ending = f"exit {process.returncode}"
    except subprocess.TimeoutExpired:
        output = _stopped(process)
    # one line a test; a summary at the end would be lost with a run that is stopped
    seen = [match[1] for line in output.splitlines() if "::" in line and (match := OUTCOME.search(line))]
    counts = {name.lower(): seen.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    seconds = round(time.monotonic() - start, 1)
    run.rows.add({"row": "tests", "which": which, **counts, "ending": ending, "seconds": seconds, "output": output[-20000:]})
    print(f"tests ({which}): {', '.join(f'{n} {name}' for name, n in counts.items())}; {ending}, {seconds} s", flush=True)
    green = counts["failed"] == counts["error"] == 0 and counts["passed"] > 0
    if not green:
        print(output[-6000:], flush=True)
    return green
