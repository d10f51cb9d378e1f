"""Compile what is needed ahead, on all cores, while the GPU is at work.

A process of the pool records an item's launches on "meta" tensors and compiles them as Triton's own launcher would, with a
stand-in for the driver that names the GPU's architecture: it needs no GPU, takes none of its memory, and what it compiles the
launcher finds in Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from multiprocessing.pool import AsyncResult
from typing import Any

import torch

from fastlora.kernels import tiles
from fastlora.kernels.compile import MULTIPROCESSORS, NEEDS, Config, Needs, ast_source, launches
from fastlora.kernels.launch import Launch

from .items import Item, Needed

__all__ = ["Ahead", "Driver", "Job", "compile_job", "keys", "needed", "packed", "standing_in", "tower"]

PATIENCE = 60.0  # seconds to wait for one kernel once its turn has come: beyond, its process has died
INTERPRETER = "TRITON_INTERPRET"


class Driver:
    """What Triton's launcher asks of a driver before it compiles, for a GPU that is not here."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """Any one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Any one."""
        return 0

    def get_current_target(self) -> Any:
        """The architecture that is compiled for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def standing_in(arch: int) -> Iterator[None]:
    """Within it Triton compiles for `arch`, whatever GPU is here or not."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(Driver(arch))
    try:
        yield
    finally:
        driver._active = before


def record(config: Config, plan: tiles.Plan | None, directions: str, needs: Needs) -> list[Launch]:
    """The launches of a "forward", a "backward" or "both" of one class of calls, by the table's plan or another."""
    forward, backward = launches(config, plan, needs)
    return {"forward": forward, "backward": backward, "both": forward + backward}[directions]


def needed(config: Config, plan: tiles.Plan | None = None, directions: str = "both", needs: Needs = NEEDS[0]) -> Needed:
    """What calls of one class start. needs: the gradients of x, A and B that a backward is asked for."""
    return Needed(record, (config, plan, directions, needs))


def packed(
    arch: int, dtype: torch.dtype, rows: int, width: int, rank: int, dropout: float, *,
    precision: tiles.Precision = "half", identities: bool = False,
) -> Config:  # fmt: skip
    """The class of calls and the shape of packed q, k, v, as sm_{arch} takes them."""
    call = tiles.Call(arch, precision, tiles.padded_rank(rank), dropout > 0)
    return Config(call, dtype, (True,) * 3, width, rows, rank, identities, dropout=dropout)


def tower(config: Config, queries: int, directions: str = "both") -> tuple[Needed, ...]:
    """What a tower of fastlora.encoders starts, whose blocks' packed q, k, v are of one class of calls.

    The blocks; the lowest, whose x wants no gradient; of the last one k and v, and q of the pooled tokens alone.
    """
    pooled = dataclasses.replace(config, active=(True,), groups=(0,), rows=queries, identities=True)
    return (
        needed(config, None, directions),
        needed(config, None, directions, (False, True, True)),
        needed(dataclasses.replace(config, active=(True, True), groups=(1, 2)), None, directions),
        needed(pooled, None, directions),
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile: a launch of an item's need, by its number."""

    needed: Needed
    number: int


@functools.cache
def keys(needed: Needed) -> tuple[str, ...]:
    """What tells the kernels of a need from others, in the order of their launches."""
    return tuple(f"{ast_source(one).hash()} {one.warps}w {one.stages}s" for one in needed.launches())


def compile_job(job: Job, arch: int) -> str | None:
    """Compile one kernel into Triton's cache; what is wrong with it in words, a race for instance, or None."""
    from fastlora.kernels.races import races

    if os.environ.get(INTERPRETER) == "1":
        return f"{INTERPRETER}=1 is set: the interpreter compiles nothing"
    launch: Launch = job.needed.launches()[job.number]
    try:
        with standing_in(arch):
            compiled = launch.compile()
    except Exception as error:  # a tile that Triton refuses is a result
        return f"{launch.kernel.__name__}: {type(error).__name__}: {str(error)[-300:]}"  # the reason stands after the source
    found = races(compiled.asm["ttgir"])
    return f"{launch.kernel.__name__}: race: {found[0]}" if found else None


def _nice() -> None:
    os.nice(10)  # what is timed on the host meanwhile comes first


class Ahead:
    """The kernels of all items being compiled, in the items' order.

    Args:
        arch: 80, 90 or 100.
        processes: how many compile side by side.
    """

    def __init__(self, items: Iterable[Item], arch: int, processes: int) -> None:
        assert arch in MULTIPROCESSORS, f"nothing is known of sm_{arch}"
        self.arch = arch
        self._known: dict[Needed, AsyncResult[tuple[str, ...]]] = {}
        self._answers: dict[str, AsyncResult[str | None]] = {}
        before = os.environ.pop(INTERPRETER, None)  # the pool's processes compile, whatever this one does
        try:
            self._pool = multiprocessing.get_context("spawn").Pool(processes, _nice)
        finally:
            if before is not None:
                os.environ[INTERPRETER] = before
        # the pool finds out which kernels there are, too: this process has the GPU to feed
        for needed in dict.fromkeys(needed for item in items for needed in item.needs):
            found = functools.partial(self._compile, needed)
            self._known[needed] = self._pool.apply_async(keys, (needed,), callback=found)

    def _compile(self, needed: Needed, found: tuple[str, ...]) -> None:
        """Have those kernels of a need compiled that are not yet."""
        for number, key in enumerate(found):
            if key not in self._answers:
                self._answers[key] = self._pool.apply_async(compile_job, (Job(needed, number), self.arch))

    def wait(self, item: Item, limit: float) -> list[str]:
        """Wait for an item's kernels, `limit` seconds at most; what is wrong with them, in words."""
        end = time.monotonic() + min(limit, PATIENCE)

        def left() -> float:
            return max(0.1, end - time.monotonic())

        problems: list[str | None] = []
        for needed in item.needs:
            try:
                # the answers are there before the keys: a callback runs first
                problems += [self._answers[key].get(left()) for key in self._known[needed].get(left())]
            except multiprocessing.TimeoutError:
                problems.append("a kernel was not compiled in time")
            except Exception as error:  # the launches could not be recorded
                problems.append(f"{type(error).__name__}: {str(error)[-300:]}")
        return [problem for problem in dict.fromkeys(problems) if problem is not None]

    def counts(self) -> dict[str, int]:
        """How many kernels there are, how many are done, and how many of these have something wrong."""
        done = [answer for answer in list(self._answers.values()) if answer.ready()]
        wrong = sum(not answer.successful() or answer.get() is not None for answer in done)
        return {"kernels": len(self._answers), "done": len(done), "wrong": wrong}

    def stop(self) -> None:
        """End the processes; what they are still at is dropped."""
        self._pool.terminate()
