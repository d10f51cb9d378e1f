"""Opt-in: FASTLORA_AUTOTUNE=1 times the plans that serve a call at the first call of each shape and keeps the fastest.

Off by default: up to a dozen plans are compiled for the first shape of a class and timed for every shape, and two machines may
then choose differently and round differently.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
import triton

from .tiles import TABLE, Call, Plan, choose

__all__ = ["best", "candidates", "enabled"]

Direction = Literal["forward", "backward"]
_FORMS = {"forward": ("one_pass_forward",), "backward": ("one_pass_backward", "da_in_epilogue")}
# A plan that this GPU or this Triton refuses is left out; anything else that goes wrong is an error.
_REFUSED = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.CompilationError)

_chosen: dict[Hashable, Plan] = {}


def enabled() -> bool:
    """Whether the environment asks for it. Nothing can be timed while a CUDA graph is being captured."""
    return os.environ.get("FASTLORA_AUTOTUNE") == "1" and torch.cuda.is_available()


def candidates(call: Call, direction: Direction) -> list[Plan]:
    """The table's plan first, then its other forms of this direction, then the other rows that serve the call, each once."""
    plans = [choose(call)]
    forms = _FORMS[direction]
    for flags in itertools.product((False, True), repeat=len(forms)):
        changes: dict[str, Any] = dict(zip(forms, flags, strict=True))
        plan = dataclasses.replace(plans[0], **changes)
        if call.dropout and plan.one_pass_forward and direction == "forward":
            # a tile of x under dropout spans whole calls of 128 columns
            tile = dataclasses.replace(plan.forward, n=min(plan.forward.n, 128), k=128, stages=2)
            plan = dataclasses.replace(plan, forward=tile)
        plans.append(plan)
    plans += [row.plan for row in TABLE if row.serves(call)]
    return list(dict.fromkeys(plans))


def best(call: Call, direction: Direction, key: Hashable, run: Callable[[Plan], object]) -> Plan:
    """The fastest candidate for `run`, timed once for each (call, direction, key); the table's plan during a graph capture."""
    known = (call, direction, key)
    if known in _chosen or torch.cuda.is_current_stream_capturing():
        return _chosen.get(known, choose(call))
    times: dict[Plan, float] = {}
    for plan in candidates(call, direction):
        try:
            times[plan] = triton.testing.do_bench(lambda plan=plan: run(plan), return_mode="median")
        except _REFUSED:
            continue
    _chosen[known] = min(times, key=lambda plan: times[plan], default=choose(call))
    return _chosen[known]
