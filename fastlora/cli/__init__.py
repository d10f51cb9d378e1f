"""The command line: `fastlora train | eval | merge | sweep | data | bench | info | demo`, one file a command.

What a user can put right is one line on stderr and exit code 2, found before models or images are loaded where it can be.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from typing import Any

import typer

from ..fewshot.errors import Interrupted, UserError
from . import bench, data, demo, evaluate, info, merge, sweep, train  # noqa: F401 - each adds its command to the app
from .app import app

__all__ = ["app", "main"]

# Typer does not export the base of its usage errors, and has its own copy of click since 0.2x.
UsageError: type[Any] = typer.BadParameter.mro()[2]


def main() -> None:
    """The entry point: runs the command and turns what a user can put right into one line and exit code 2."""
    sys.exit(_guarded(lambda: app(standalone_mode=False)))


def _guarded(command: Callable[[], Any]) -> int:
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except typer.Abort:
        return 130
    except UsageError as error:
        return _complain(error.format_message().replace("\n", " "), error.exit_code)
    except UserError as error:
        return _complain(str(error), 2)
    except Interrupted as stop:
        return _complain(str(stop), stop.exit_code)
    except MemoryError as error:
        return _complain(str(error) or "out of memory", 2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            return _complain(f"no space left{where}: free some and go on with --resume", 2)
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _complain(f"{error.strerror}: {error.filename}", 2)
        raise


def _complain(message: str, code: int) -> int:
    print(f"fastlora: {message}", file=sys.stderr)
    return code
