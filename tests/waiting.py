"""Waiting in tests: for what happens, not for a time, as other work may share the machine."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds, for whatever may hang; far more than anything takes, so that a slow machine never reaches it.
HANG = 1200.0


def wait(happened: Callable[[], object]) -> None:
    """Ask again and again until it has happened.

    Raises:
        TimeoutError: it hangs.
    """
    until = time.monotonic() + HANG
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {HANG:.0f} s")
        time.sleep(0.02)
