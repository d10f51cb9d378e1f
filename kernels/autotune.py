"""Opt-in: FASTLORA_AUTOTUNE=1 times the forms of a plan at the first call of each shape and keeps the fastest.

Off by default: it costs seconds a shape, and two machines may then choose differently and round differently.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Hashable

import torch
import triton

from .tiles import TABLE, Call, Plan, choose

__all__ = ["best", "candidates", "enabled"]

_chosen: dict[Hashable, Plan] = {}


def enabled() -> bool:
    """Whether the environment asks for it. Nothing can be timed while a CUDA graph is being captured."""
    return os.environ.get("FASTLORA_AUTOTUNE") == "1" and torch.cuda.is_available()


def candidates(call: Call) -> list[Plan]:
    """The table's plan first, then its other forms and those of all rows that serve the call, each once."""
    rows = [row.plan for row in TABLE if row.serves(call)]
    plans = []
    for row, one, whole, epilogue in itertools.product(rows, (False, True), (False, True), (False, True)):
        plan = dataclasses.replace(row, one_pass_forward=one, one_pass_backward=whole, da_in_epilogue=epilogue)
        if one and call.dropout:
            # a tile of x under dropout spans whole calls of 128 columns
            tile = dataclasses.replace(row.forward, n=min(row.forward.n, 128), k=128, stages=2)
            plan = dataclasses.replace(plan, forward=tile)
        plans.append(plan)
    return list(dict.fromkeys([choose(call), *plans]))


def best(call: Call, key: Hashable, run: Callable[[Plan], object]) -> Plan:
    """The fastest candidate for `run`, timed once for each (call, key); the table's plan during a graph capture."""
    if (call, key) in _chosen or torch.cuda.is_current_stream_capturing():
        return _chosen.get((call, key), choose(call))
    times: dict[Plan, float] = {}
    for plan in candidates(call):
        try:
            times[plan] = triton.testing.do_bench(lambda plan=plan: run(plan), return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue
    _chosen[call, key] = min(times, key=lambda plan: times[plan], default=choose(call))
    return _chosen[call, key]
