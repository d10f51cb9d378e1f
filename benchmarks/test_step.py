"""A whole training step, both encoders, loss, backward and AdamW, of each contestant: time, peak memory, FLOPs, saved bytes."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from baselines import TRAINEES, Job, Trainee, inputs
from fastlora.bench.rows import MODEL
from fastlora.fewshot.memory import keep_freed
from measure import Timing, by_events, by_graph, summary
from memory import counts, measure
from recorder import Recorder
from steps import WARM_UP, checked, in_chunks, seconds_of_step

# What the quick profile times of a large model on a CPU. Each takes half a minute, its gate included; these share one truth.
# That of the contestants without adapters (the floor, full fine-tuning) alone would take almost as long again.
MAIN = ("fastlora", "cuBLAS beta=1", "textbook", "the paper's arithmetic")


def cases(profile: str, device: str) -> list[Job]:
    """mini: the model that ships with fastlora. The others: open_clip's, of OpenAI's architecture, at random weights."""
    if profile == "tiny":
        return [Job("mini", classes=3, batch=2, device=device)]
    if profile == "quick":
        sizes = (("mini", 10), (MODEL, 10)) if device == "cpu" else (("mini", 10), ("mini", 100), (MODEL, 100))
        return [Job(model, classes=classes, device=device) for model, classes in sizes]
    # the largest last: on a CPU some steps of 1000 classes need 60 GB and are timed in chunks
    models = ("mini", "ViT-B-32", "ViT-B-16", "ViT-L-14")[: 2 if device == "cpu" else None]
    jobs = itertools.product((10, 100, 1000), (name if name == "mini" else f"{name}-quickgelu" for name in models))
    return [Job(model, classes=classes, device=device) for classes, model in jobs]


@pytest.mark.parametrize("name", TRAINEES)
def test_step(case: Job, name: str, benchmark: Any, recorder: Recorder) -> None:
    """Gate first, then time and memory; a red gate fails and gives no number."""
    trainee = TRAINEES[name]
    if (reason := trainee.missing()) is not None:
        pytest.skip(reason)
    if trainee.compiles and case.device == "cpu" and recorder.profile != "full":
        pytest.skip("compiling takes a minute a case on a CPU: --profile full")
    if recorder.profile == "quick" and case.device == "cpu" and case.model != "mini" and name not in MAIN:
        pytest.skip("the quick profile has the main contestants on a large model: --profile full")
    keep_freed()  # as `fastlora train` does; all contestants gain
    try:
        contestant = checked(name, case)
    except AssertionError as error:
        recorder.rows.add({"row": "step", **case.row(), "contestant": name, "refused": str(error)})
        raise
    benchmark.group, benchmark.name = case.name, name
    row: dict[str, Any] = {"row": "step", **case.row(), "contestant": name, "phase": "step"}
    numbers = itertools.cycle((1, 2))
    rounds = {"tiny": 1, "quick": 5 if case.model == "mini" else 2 if case.device == "cpu" else 3, "full": 5}[recorder.profile]
    chunks = in_chunks(trainee, case)
    if not chunks:
        row |= counts(contestant)
    found: list[float] = []
    benchmark.pedantic(
        lambda: found.append(seconds_of_step(contestant, next(numbers))),
        rounds=rounds,
        # counting took a step, which mapped the same memory
        warmup_rounds=(WARM_UP if chunks else WARM_UP - 1) if case.device == "cpu" else 10,
    )
    timings = [summary(found[-rounds:], "chunks" if chunks else "clock")]
    if case.device == "cuda":
        timings += _on_cuda(contestant, row)
    memory = measure(name, case) if not chunks and _wants_memory(recorder.profile, case) else {}
    for timing in timings:
        full = row | timing.row() | memory
        if "flops" in row:
            full["share_of_gemm_speed"] = row["flops"] / timing.median / recorder.ceilings(contestant.compute_dtype).flops
        benchmark.extra_info[timing.method] = full | recorder.add(full)


def _on_cuda(contestant: Trainee, row: dict[str, Any]) -> list[Timing]:
    """By events, and by replay of a CUDA graph of the step where it can be captured; the row says why where not."""
    calls = [functools.partial(contestant.step, *inputs(contestant.job, number)) for number in (1, 2)]
    timings = [by_events(calls, 3.0, least=20)]
    stream = torch.cuda.Stream()
    try:
        timings.append(by_graph(calls, stream, 3.0))
    except Exception as error:  # torch raises many types here; a step that reads its loss on the host is one reason
        row["no_graph"] = repr(error)[:300]
        torch.cuda.synchronize()
    return timings


def _wants_memory(profile: str, case: Job) -> bool:
    """A fresh process each, seconds to start: everywhere in the full profile, in the quick one at 100 classes alone."""
    return profile == "full" or (profile == "quick" and case.model == "mini" and case.classes == 100)
