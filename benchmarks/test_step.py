"""A whole training step, both encoders, loss, backward and AdamW, of each contestant: time, peak memory, FLOPs, saved bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from baselines import TRAINEES, Job, inputs
from measure import by_events, summary
from memory import counts, measure, ready
from recorder import Recorder
from step_gate import drops_out, gate


def cases(profile: str, device: str) -> list[Job]:
    """mini: the model that ships with fastlora. ViT-B-32: open_clip's, at random weights."""
    if profile == "tiny":
        return [Job("mini", classes=3, batch=2, device=device)]
    if profile == "quick":
        mini = [Job("mini", classes=classes, device=device) for classes in (10, 100)]
        return [*mini, Job("ViT-B-32", classes=10, batch=8 if device == "cpu" else 32, device=device)]
    # the largest last: on a CPU the paper's arithmetic needs minutes and 60 GB a step at 1000 classes
    models = ("mini", "ViT-B-32") if device == "cpu" else ("mini", "ViT-B-32", "ViT-B-16", "ViT-L-14")
    return [Job(model, classes=classes, device=device) for classes in (10, 100, 1000) for model in models]


@pytest.mark.parametrize("name", TRAINEES)
def test_step(case: Job, name: str, benchmark: Any, recorder: Recorder) -> None:
    """Gate first, then time and memory; a red gate fails and gives no number."""
    trainee = TRAINEES[name]
    if (reason := trainee.missing()) is not None:
        pytest.skip(reason)
    red = [line for ok, line in gate(trainee, case) if not ok]
    assert not red, f"{name} is wrong, so it is not timed: {red}"
    if reason := _too_large(trainee.name, case):
        pytest.skip(reason)
    benchmark.group = case.name
    contestant = ready(trainee, case)
    assert trainee.trains != "adapters" or drops_out(contestant), f"{name} ignores dropout, so it is not timed"
    batches = itertools.cycle([inputs(case, number) for number in (1, 2)])
    row: dict[str, Any] = {"row": "step", "case": case.name, "contestant": name, "phase": "step"} | counts(contestant)

    def step() -> None:
        contestant.step(*next(batches))
        if recorder.device.type == "cuda":
            torch.cuda.synchronize()

    rounds = {"tiny": 1, "quick": 5 if case.model == "mini" else 3, "full": 5}[recorder.profile]
    # `counts` has run a step already, which is the warm-up of a CPU
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=0 if case.device == "cpu" else 10)
    timings = [summary(benchmark.stats.stats.data, "clock")]
    if case.device == "cuda":
        timings.append(by_events([lambda: contestant.step(*next(batches))], 3.0, least=20))
    memory = measure(name, case) if _wants_memory(recorder.profile, case) else {}
    for timing in timings:
        share = row["flops"] / timing.median / recorder.ceilings(contestant.compute_dtype).flops
        full = row | timing.row() | memory | {"share_of_gemm_speed": share}
        benchmark.extra_info[timing.method] = full | recorder.add(full)


def _wants_memory(profile: str, case: Job) -> bool:
    """A fresh process each: everywhere in the full profile, once in the quick one, never in the tiny one."""
    return profile == "full" or (profile == "quick" and case.model == "mini" and case.classes == 100)


def _too_large(name: str, case: Job) -> str | None:
    """Why a CPU's memory does not hold this step, or None."""
    if case.device != "cpu" or case.model == "mini" or case.classes < 1000 or name == "fastlora":
        return None
    return "a step at 1000 classes and 77 tokens takes up to 60 GB here; only fastlora is measured"
