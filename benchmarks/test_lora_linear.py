"""One adapted layer: a linear, packed q, k, v, an MLP; forward, backward and both, really apart."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from measure import Timing, by_events, by_graph, peak_memory, saved_bytes, summary
from ops import CONTESTANTS, Contestant, bind, gate, phase_calls
from recorder import Recorder
from shapes import Case, InputSet


def cases(profile: str, device: str) -> list[Case]:
    """The shapes of a profile: ViT-B's width, tokens of a batch that the machine does in time."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    m, d = {"tiny": (24, 32), "quick": (800, 768), "full": (6304, 768)}[profile]
    if device == "cuda" and profile == "full":
        m = 50432
    found = [Case("qkv", m, d, 3 * d, 3, 16, p, dtype, device) for p in (0.0, 0.25)]
    if profile == "quick" and device == "cpu":  # minutes go to whole steps: with dropout, as the paper trains
        found = found[1:]
    elif profile != "tiny":
        found.append(Case("linear", m, d, d, 1, 16, 0.25, dtype, device))
    found.append(Case("mlp", m, d, 4 * d, 1, 16, 0.25, dtype, device))
    if profile == "full":
        found.append(Case("qkv", m, 1024, 3072, 3, 2, 0.25, dtype, device))
    return found


@pytest.mark.parametrize("phase", ["forward", "backward", "both"])
@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda c: c.name)
def test_lora_linear(case: Case, contestant: Contestant, phase: str, benchmark: Any, recorder: Recorder) -> None:
    """Gate first, then time; a red gate fails and gives no number."""
    if (reason := contestant.missing(case)) is not None and not (contestant.compiles and recorder.profile == "full"):
        pytest.skip(reason)
    if red := _red(contestant, case):
        recorder.rows.add({"row": "op", "case": case.name, "contestant": contestant.name, "refused": red})
    assert not red, f"{contestant.name} is wrong, so it is not timed: {red}"
    benchmark.group, benchmark.name = f"{case.name}, {phase}", contestant.name
    sets = [InputSet.draw(case, number) for number in range(1, 3 if case.device == "cpu" else 9)]
    stream = torch.cuda.Stream() if case.device == "cuda" else None
    with torch.cuda.stream(stream):
        bounds = [bind(contestant, inputs) for inputs in sets]
        calls = phase_calls(bounds, phase)
        timings = [_clock(benchmark, calls, recorder)]
        if stream is not None:
            timings += [by_events(calls, 0.2), by_graph(calls, stream, 0.2)]
        memory: dict[str, int] = {}
        if phase == "both":
            parameters = [t for layer in sets[0].layers for t in vars(layer).values()]
            memory["saved_bytes"] = saved_bytes(bounds[0].forward, parameters)
            with peak_memory(recorder.device) as peak:
                bounds[0].both()
            memory |= peak
    flops, nbytes = case.work(phase)
    roofline = recorder.ceilings(case.dtype).seconds(flops, nbytes)
    for timing in timings:
        row = {"row": "op", **case.row(), "contestant": contestant.name, "phase": phase, **timing.row(), **memory}
        row["share_of_roofline"] = roofline / timing.median
        benchmark.extra_info[timing.method] = row | recorder.add(row)


@functools.cache
def _red(contestant: Contestant, case: Case) -> list[str]:
    """What the gate found wrong: asked once for all phases."""
    return [line for ok, line in gate(contestant, case) if not ok]


def _clock(benchmark: Any, calls: list[Any], recorder: Recorder) -> Timing:
    """pytest-benchmark's own rounds, over the input sets in turn."""
    rotation = itertools.cycle(calls)

    def call() -> None:
        next(rotation)()
        if recorder.device.type == "cuda":
            torch.cuda.synchronize()

    rounds = {"tiny": 2, "quick": 5, "full": 15}[recorder.profile]
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=len(calls))
    return summary(benchmark.stats.stats.data, "clock")
