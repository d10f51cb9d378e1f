"""The process that watches the one at work: it ends what hangs, starts anew what has crashed, and keeps to the minutes.

It imports no torch and touches no GPU, so that a kernel that hangs, or kills its process, cannot hurt it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from rows import append, complete_lines, read_rows

from .items import Row

__all__ = ["LOST", "Watch", "supervise"]

LOST = 75  # the exit status of a worker whose CUDA context is gone: once more, behind what lost it
HANGS = 60.0  # seconds beyond three times what an item was expected to take after which it hangs
GRACE = 4.0  # seconds kept for ending the worker and for the summary
RESTART = 20.0  # seconds without which no worker is started anew
POLL = 0.2


@dataclasses.dataclass
class Watch:
    """The rows of a call as they come, and the item that is being worked on.

    Args:
        path: the file of rows.
        status: of the last worker.
    """

    path: Path
    rows: list[Row] = dataclasses.field(default_factory=list)
    status: int | None = None
    current: Row | None = None
    since: float = 0.0
    size: int = 0

    def look(self) -> None:
        """Take in the rows that are new."""
        if not self.path.exists() or (size := self.path.stat().st_size) == self.size:
            return
        self.size = size
        for row in read_rows(self.path)[len(self.rows) :]:
            self.rows.append(row)
            if row["row"] == "begin":
                self.current, self.since = row, time.monotonic()
            elif row["row"] == "end":
                self.current = None

    def hangs(self) -> bool:
        """Whether an item takes so long that it will never end."""
        return self.current is not None and time.monotonic() - self.since > 3 * self.current["expected_s"] + HANGS

    def note(self, row: Row) -> None:
        """Add a row for what the worker could not say itself."""
        complete_lines(self.path)
        append(self.path, row)
        self.look()


def supervise(command: Sequence[str], path: Path, minutes: float) -> Watch:
    """Run a worker until it has done everything or the minutes are over; its rows.

    Args:
        command: the worker's command line; --seconds is added.
        path: the file that the worker adds its rows to.
    """
    end = time.monotonic() + 60 * minutes - GRACE
    watch = Watch(path)
    while True:
        before = len(watch.rows)
        process = _start([*command, "--seconds", f"{max(1.0, end - time.monotonic()):.1f}"])
        try:
            ended = _follow(process, watch, end)
        finally:  # Ctrl-C as well
            _stop(process)
        watch.status = process.returncode
        watch.look()
        late = time.monotonic() > end
        if watch.current is not None:
            why = ended or f"its process ended with status {process.returncode}"
            about: Row = {key: value for key, value in watch.current.items() if key not in ("row", "expected_s")}
            watch.note({"row": "stopped", **about, "why": why} if late else {"row": "failed", **about, "failed": why})
            print(f"  {watch.current['item']}: {why}", flush=True)
            watch.current = None
        begun = any(row["row"] == "begin" for row in watch.rows[before:])
        if process.returncode == 0 or late or end - time.monotonic() < RESTART or not begun:
            return watch
        print("the worker is started anew, behind what stopped it", flush=True)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    # a session of its own: its compilers end with it
    return subprocess.Popen(command, start_new_session=True)


def _follow(process: subprocess.Popen[bytes], watch: Watch, end: float) -> str | None:
    """Wait for a worker; why it must be ended, or None where it ended by itself."""
    while process.poll() is None:
        watch.look()
        if time.monotonic() > end:
            return "the time is up"
        if watch.hangs():
            return f"it hangs: nothing came of it for {time.monotonic() - watch.since:.0f} s"
        time.sleep(POLL)
    return None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a worker and whatever it started: its compilers, and the tests, which are a group of their own."""
    for member in {process.pid, *_session(process.pid)}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(member, signal.SIGKILL)
    process.wait()


def _session(leader: int) -> list[int]:
    """The processes of a session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                found.append(int(stat.parent.name))
    return found
