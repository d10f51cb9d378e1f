"""SIGTERM and SIGINT as an exception that says how to go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from .errors import Interrupted

__all__ = ["Signals"]


class Signals(contextlib.AbstractContextManager["Signals"]):
    """SIGTERM and SIGINT as Interrupted: at once, or, inside `deferred`, when the loop looks (a second one: at once).

    Args:
        how: how to go on, for the message.
    """

    def __init__(self, how: str) -> None:
        self.how = how
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block look at `received` itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and self.received is None:
            self.received = number
        else:
            raise Interrupted(number, f"stopped; {self.how}")
