"""Carrying out one run of a sweep, in this process or in a worker's: at most once at a time, never twice."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
from pathlib import Path

from rich.console import Console

from .. import datasets
from ..errors import Interrupted, UserError
from ..lock import Busy
from ..runfolder import RunFolder
from ..shared import Shared
from ..trainer import Job
from ..trainer import run as train
from .grid import Run

__all__ = ["BUSY", "Place", "execute", "locate"]


BUSY = "another process is at work on it"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where and how a sweep works.

    Args:
        out: the folder of the sweep; every worker must see it.
        roots: where known data sets are looked for, in this order.
        device: "auto", "cpu", "cuda", …
        reports: leave report.html, a TensorBoard log and fully trained models in each run's folder.
        again: the command that goes on with the sweep.
    """

    out: Path
    roots: tuple[Path, ...]
    device: str = "auto"
    reports: bool = False
    again: str = "the same call"


def execute(run: Run, place: Place, shared: Shared) -> str | None:
    """Carry out `run`, or go on with it where it was stopped; nothing where it is finished. What went wrong, or None.

    Raises:
        Interrupted: a signal asked to stop; the run can be gone on with.
    """
    folder = place.out / run.name
    if RunFolder(folder).metrics.is_file():
        return None
    job = Job(
        run.recipe, run.data, folder, locate(run.data, place.roots), place.device, resume=True,
        again=place.again, brief=not place.reports,
    )  # fmt: skip
    try:
        train(job, Console(quiet=True), shared)
    except Interrupted:
        raise
    except Busy:
        return BUSY
    except (UserError, MemoryError) as error:
        return str(error) or "out of memory"
    except Exception as error:  # one broken run must not end an unattended night
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} (see {folder / 'error.txt'})"
    return None


def locate(data: str, roots: tuple[Path, ...]) -> Path:
    """The first root that has the data set.

    Raises:
        UserError: none has it.
    """
    for root in roots[:-1]:
        with contextlib.suppress(UserError):
            datasets.find(data, root)
            return root
    datasets.find(data, roots[-1])
    return roots[-1]
