"""One owner of a folder: whoever writes there holds a lock, and everybody else is told who that is."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .errors import UserError

__all__ = ["LOCK_FILES", "Busy", "check_free", "owned"]

# The lock, and in it, in words, who holds it. It is there while somebody is at work, or after a kill.
LOCK = ".lock"
# Stands in for it on a file system without locks: a file that holds a process's number, and goes stale with the process.
SOFT_LOCK = ".lock-soft"
LOCK_FILES = (LOCK, SOFT_LOCK)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
# Seconds to wait for a holder that is just leaving, and how often an empty folder may be taken away by one.
PATIENCE, MOST_TRIES = 0.2, 10


class Busy(UserError):
    """Another process, or thread, is at work in the folder."""


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Within: nobody else owns `folder`, which is made if it is not there. A thread may own what it owns already.

    What was made is removed in the end if nothing was put into it. A process that is killed owns nothing any more.

    Raises:
        Busy: somebody else owns it; the message says who, where and since when.
        UserError: `folder` is a file, or may not be written to.
    """
    made: list[Path] = []
    try:
        lock = _acquire(folder, made)
        try:
            yield
        finally:
            _release(folder, lock)
    finally:
        with contextlib.suppress(OSError):  # what is not empty stays, and so does all above it
            for path in reversed(made):
                path.rmdir()


def check_free(folder: Path) -> None:
    """Raise Busy if somebody else owns `folder`. Nothing is made, and a folder that may not be written to counts as free."""
    if (folder / LOCK).exists():
        try:
            with owned(folder):
                pass
        except Busy:
            raise
        except UserError:  # a reader, who cannot lock what is another user's
            pass


def _acquire(folder: Path, made: list[Path]) -> BaseFileLock:
    path = folder / LOCK
    for _ in range(MOST_TRIES):
        try:
            _make(folder, made)
            try:
                # a singleton: one lock a path and thread, so that the same thread may take it again and another one not
                lock: BaseFileLock = FileLock(path, PATIENCE, is_singleton=True, fallback_to_soft=False, on_acquired=_sign)
                lock.acquire()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                lock = SoftFileLock(folder / SOFT_LOCK, PATIENCE, is_singleton=True)
                lock.acquire()
                path.write_text(_whoami(), encoding="utf-8")
            return lock
        except Timeout:
            raise Busy(f"another process is at work in {folder}: {_holder(folder)}") from None
        except FileNotFoundError:  # somebody who left took the empty folder along
            continue
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{folder} is a file, or a link that leads nowhere, and no folder") from None
        except PermissionError:
            where = path if path.exists() else folder
            raise UserError(f"no permission to write to {where}, which says who is at work there") from None
        except OSError as error:
            raise UserError(f"{folder} cannot be locked: {error.strerror}") from error
    raise UserError(f"{folder} cannot be locked: it goes away again and again")


def _make(folder: Path, made: list[Path]) -> None:
    """Make `folder` and its parents; `made` gets those that were not there, outermost first."""
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            path.mkdir(exist_ok=True)
            made.append(path)


def _release(folder: Path, lock: BaseFileLock) -> None:
    """Leave `folder`; the lock's files go while it is still held, so that nobody can be waiting for one that is gone."""
    if lock.lock_counter == 1:
        with contextlib.suppress(OSError, ValueError):
            if (folder / LOCK).read_text(encoding="utf-8").startswith(_process()):
                (folder / LOCK).unlink()
    lock.release()


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()} since "


def _whoami() -> str:
    return f"{_process()}{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}\n"


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, _whoami().encode())


def _holder(folder: Path) -> str:
    """Who holds the lock, in words."""
    try:
        said = (folder / LOCK).read_text(encoding="utf-8").strip() or "it has not said which"
    except (OSError, ValueError):
        said = "it does not say which"
    soft = folder / SOFT_LOCK
    return f"{said}; if it is not running any more, remove {soft}" if soft.exists() else said
