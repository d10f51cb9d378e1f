"""The Ray engine: the same runs on every machine of a cluster that sees the sweep's folder.

One actor a slot holds its model and decoded images, as the local engine does. The driver hands out runs one by one and counts
on nothing but the run folders: a worker that dies gets a successor, and its run goes on from its last checkpoint elsewhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import Interrupted, UserError
from ..shared import Shared
from .execute import BUSY, Place, execute
from .grid import Run
from .runner import Engine

__all__ = ["Worker", "engine"]

# A run that takes its worker down this often is at fault itself (mostly for want of memory).
MOST_DEATHS = 5
STOPPED = "its worker was told to stop"
# A dead holder lets go of its lock within moments; then it is asked for again, after this many seconds.
ASK_AGAIN = 1.0


class Worker:
    """What an actor runs: one run after another with one loaded model."""

    def __init__(self) -> None:
        self._shared = Shared()

    def work(self, run: Run, place: Place) -> str | None:
        """Carry out one run; what went wrong, or None."""
        try:
            return execute(run, place, self._shared)
        except Interrupted:
            return STOPPED


def engine(address: str | None, workers: int | None) -> Engine:
    """An engine on the Ray cluster at `address`, or on one of its own on this machine.

    Args:
        address: as ray.init takes it ("auto", "ray://host:10001"); None starts a cluster that ends with the sweep.
        workers: runs at a time; None for one a GPU, or, without any, one a core.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    try:
        import ray
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install ray") from error

    def carry_out(runs: Sequence[Run], place: Place) -> Iterator[tuple[Run, str | None]]:
        options: dict[str, Any] = {"num_cpus": workers, "include_dashboard": False} if address is None else {"address": address}
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"Ray cluster {address or 'here'}: {' '.join(str(error).split())[:200]}") from error
        try:
            yield from _carry_out(ray, runs, place, workers)
        finally:
            ray.shutdown()

    return carry_out


def _carry_out(ray: Any, runs: Sequence[Run], place: Place, workers: int | None) -> Iterator[tuple[Run, str | None]]:
    resources = ray.cluster_resources()
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    slots = min(workers or gpus or cores, len(runs))
    actor = ray.remote(num_cpus=1, num_gpus=1 if gpus and place.device != "cpu" else 0)(Worker)
    left = list(runs)
    deaths: Counter[str] = Counter()
    at_work: dict[Any, tuple[Any, Run]] = {}

    def hand_out(worker: Any, last: Run | None) -> None:
        if left:  # preferably of the data set whose images it has decoded
            run = next((r for r in left if last is not None and r.data == last.data), left[0])
            left.remove(run)
            at_work[worker.work.remote(run, place)] = worker, run

    for _ in range(slots):
        hand_out(actor.remote(), None)
    while at_work:
        (ready,), _ = ray.wait(list(at_work), num_returns=1)
        worker, run = at_work.pop(ready)
        try:
            error = ray.get(ready)
        except ray.exceptions.RayActorError:
            worker, error = actor.remote(), "its worker died"
        if error in (STOPPED, BUSY, "its worker died"):
            deaths[run.name] += 1
            if deaths[run.name] < MOST_DEATHS:
                left.insert(0, run)
                if error == BUSY:
                    time.sleep(ASK_AGAIN)
                hand_out(worker, run)
                continue
            error = f"{error}, {MOST_DEATHS} times"
        yield run, error
        hand_out(worker, run)
