"""A GPU that is not there: calls get the Triton kernels, and what is found out about them lies in a folder of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastlora import backend, verdicts
from fastlora.verdicts import Key

GPU = Key("Made-up 4000", "1.2.3", "2.0", "3.0", "hash")


def pretend(monkeypatch: pytest.MonkeyPatch, cache: Path, key: Key = GPU) -> None:
    """Calls get the kernels, as on a GPU that nobody has measured, in a new process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(backend, "_worse", lambda *_: None)
    monkeypatch.setattr(Key, "of", classmethod(lambda cls, device: key))
    new_process()


def new_process() -> None:
    """Forget what a process knows by itself."""
    verdicts.book.cache_clear()
