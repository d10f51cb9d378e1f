"""Folders that another process is at work in."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_OWNER = """
import sys
from pathlib import Path
from fastlora.fewshot.lock import owned
with owned(Path(sys.argv[1])):
    print("at work", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Within: another process owns `folder`; it leaves as it should in the end, if it has not been killed."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _OWNER, str(folder)], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield process
