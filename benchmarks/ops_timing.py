"""One adapted layer timed side by side by the clock: contestants take turns, each phase apart."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

from machine import Ceilings
from measure import saved_bytes, summary
from ops import Contestant, bind, phase_calls
from shapes import Case, InputSet


def op_rows(case: Case, contestants: list[Contestant], rounds: int, limits: Ceilings) -> list[dict[str, Any]]:
    """A row for each contestant and phase, the floor's first, over two input sets."""
    sets = [InputSet.draw(case, number) for number in (1, 2)]
    rows = []
    bounds = {c.name: [bind(c, inputs) for inputs in sets] for c in contestants}
    weights = [t for layer in sets[0].layers for t in vars(layer).values()]
    for phase in ("forward", "backward", "both"):
        calls = {name: itertools.cycle(phase_calls(bound, phase)) for name, bound in bounds.items()}
        for rotation in calls.values():
            next(rotation)()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, rotation in calls.items():
                call = next(rotation)
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        flops, nbytes = case.work(phase)
        for name, seconds in times.items():
            timing = summary(seconds, "clock")
            ratios = [mine / floor for mine, floor in zip(seconds, times["frozen"], strict=True)]
            row = {"row": "op", **case.row(), "contestant": name, "phase": phase, **timing.row()}
            row |= {
                "over_frozen": statistics.median(ratios),
                "ratios": [round(value, 4) for value in ratios],
                "share_of_roofline": limits.seconds(flops, nbytes) / timing.median,
            }
            if phase == "both":
                row["saved_bytes"] = saved_bytes(bounds[name][0].forward, weights)
            rows.append(row)
    return rows
