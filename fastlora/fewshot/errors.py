"""What a user can put right: told in one line, never as a traceback."""

from __future__ import annotations

import signal

__all__ = ["Interrupted", "UserError"]


class UserError(Exception):
    """Something the user can put right; the message is one line that says what is wrong and what would be right."""


class Interrupted(Exception):
    """A signal asked the run to stop; the message says how to go on."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports for a process that this signal ended."""
        return 128 + signal.Signals(self.signum)
