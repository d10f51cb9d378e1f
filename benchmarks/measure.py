"""Medians with quantiles: by the clock on a CPU, by events and by graph replay on a GPU, always over several input sets.

A call is one of several functions that do the same work on different inputs. Calls rotate over them, so that a set that one
call leaves in the cache is pushed out by the others before it is used again.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fastlora.fewshot.compare import kept_for_backward
from machine import synchronize

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, the 10 % and 90 % quantiles, and how many were timed."""

    median: float
    low: float
    high: float
    rounds: int
    method: str

    def row(self) -> dict[str, Any]:
        """As written to a results file: milliseconds."""
        milliseconds = {k: round(getattr(self, k) * 1e3, 6) for k in ("median", "low", "high")}
        return {f"{k}_ms": v for k, v in milliseconds.items()} | {"rounds": self.rounds, "method": self.method}


def summary(seconds: Sequence[float], method: str) -> Timing:
    """The quantiles of a list of times."""
    ordered = sorted(seconds)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.1, 0.9))
    return Timing(statistics.median(ordered), low, high, len(ordered), method)


def by_clock(calls: Sequence[Call], device: torch.device, budget: float, least: int = 5, most: int = 200) -> Timing:
    """Wall time of a call that ends with the device idle."""
    for call in calls[:2]:
        call()
    synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + budget
    rotation = cycle(calls)
    while len(times) < least or (time.perf_counter() < end and len(times) < most):
        call = next(rotation)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return summary(times, "clock")


def by_events(calls: Sequence[Call], budget: float, least: int = 10, most: int = 200) -> Timing:
    """CUDA events around each call, queued without waiting, so that launch gaps count only where the host falls behind."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    each = (time.perf_counter() - start) / len(calls)
    rounds = max(least, min(most, int(budget / max(each, 1e-6))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    rotation = cycle(calls)
    for before, after in events:
        call = next(rotation)
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return summary([before.elapsed_time(after) / 1e3 for before, after in events], "events")


def by_graph(calls: Sequence[Call], stream: torch.cuda.Stream, budget: float, least: int = 5, most: int = 100) -> Timing:
    """Replays of a CUDA graph that holds every call once: what the work takes without the host.

    Args:
        stream: the stream on which whatever the calls read was made; autograd runs a backward where its forward ran.
    """
    torch.cuda.synchronize()  # inputs may have been made on another stream
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    timing = by_events([graph.replay], budget, least, most)
    graph.reset()
    scaled = {k: getattr(timing, k) / len(calls) for k in ("median", "low", "high")}
    return dataclasses.replace(timing, **scaled, method="graph")


def saved_bytes(forward: Callable[[], Any], known: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once, without those of `known` (weights and other parameters)."""
    return sum(kept_for_backward(forward, known).values())


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, int]]:
    """On a GPU the bytes the allocator reached above what was held on entry; empty on a CPU: there a fresh process tells."""
    found: dict[str, int] = {}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield found
    torch.cuda.synchronize(device)
    found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
