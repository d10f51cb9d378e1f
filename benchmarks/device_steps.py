"""`benchmarks/device.py --step`: whole training steps of ViT-B/16 on a GPU, every way of adapting it, every engine for it.

Each contestant passes the step's gate, warms up, then up to 200 steps are timed one by one with CUDA events; a row keeps their
median and quantiles and peak memory, a second one where the time goes, kernel by kernel. "graph" is the whole step, optimizer
included, captured once and replayed. What takes a minute to compile comes last.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from baselines import TRAINEES, Job, Trainee, inputs
from measure import Timing, by_clock, by_events, peak_memory
from run import Run
from steps import checked

WARM_UP, STEPS = 20, 200
SECONDS = 8.0  # for the timed steps of one contestant, and for its warm-up at most: 20 steps of the slowest one
ENGINES = {
    "as written": [name for name, trainee in TRAINEES.items() if not trainee.compiles],
    "graph": ["fastlora", "fastlora, share_prefix"],
    "compile": ["fastlora", "fastlora, share_prefix", "textbook"],
}
NEEDS = {"as written": 30.0, "graph": 30.0, "compile": 120.0}  # seconds that must be left to begin
Step = Callable[[], object]


def jobs(smoke: bool, device: str) -> list[Job]:
    """The recipe's batch of 32 at 10, 100 and 1000 classes."""
    if smoke:
        return [Job("mini", classes=3, batch=2, device=device, depth=2, width=64)]
    return [Job("ViT-B-16-quickgelu", classes=classes, device=device) for classes in (10, 100, 1000)]


def _captured(contestant: Trainee, images: Tensor, labels: Tensor) -> Step:
    """Forward, backward and AdamW as one CUDA graph, which reads these two tensors."""
    for group in contestant.optimizer.param_groups:
        group["capturable"] = True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            contestant.step(images, labels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contestant.step(images, labels)
    return graph.replay


def _step(contestant: Trainee, engine: str, job: Job) -> Step:
    """One step on the next of two batches, by an engine."""
    batches = itertools.cycle([inputs(job, number) for number in (1, 2)])
    if engine == "graph":
        images, labels = (t.clone() for t in next(batches))
        replay = _captured(contestant, images, labels)

        def step() -> None:
            for target, value in zip((images, labels), next(batches), strict=True):
                target.copy_(value)
            replay()

        return step
    if engine == "compile":
        contestant.loss = torch.compile(contestant.loss, dynamic=False)  # type: ignore[method-assign]
    return lambda: contestant.step(*next(batches))


def _profile(step: Step) -> list[dict[str, Any]]:
    """The twenty kernels that take most of a step, in microseconds a step."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    ) as found:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    rows = [e for e in found.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    rows.sort(key=lambda e: -e.self_device_time_total)
    return [{"kernel": e.key[:120], "us": round(e.self_device_time_total / 3, 1), "calls": e.count / 3} for e in rows[:20]]


def _timed(run: Run, step: Step) -> Timing:
    if run.device.type != "cuda":
        return by_clock([step], run.device, 0.0, least=1)
    start = time.monotonic()
    for _ in range(WARM_UP):
        step()
        torch.cuda.synchronize()
        if time.monotonic() - start > SECONDS:
            break
    # the row says how many were timed
    return by_events([step], SECONDS, most=STEPS)


def _measure(run: Run, row: dict[str, Any], job: Job) -> None:
    """Time one contestant by one engine; its row is on disk before anything else is tried."""
    name, engine = row["contestant"], row["engine"]
    if (reason := TRAINEES[name].missing()) is not None:
        run.rows.add(row | {"skipped": reason})
        return
    try:
        contestant = checked(name, job)
    except AssertionError as error:
        run.rows.add(row | {"refused": str(error)[:2000]})
        print("  refused:", str(error)[:300], flush=True)
        return
    with peak_memory(run.device) as peak:
        step = _step(contestant, engine, job)
        timing = _timed(run, step)
    run.rows.add(row | dataclasses.asdict(job) | timing.row() | peak)
    print(f"  {timing.median * 1e3:.2f} ms, {timing.rounds} steps", flush=True)
    if run.device.type == "cuda":
        run.rows.add(row | {"row": "profile", "kernels": _profile(step)})


def measure_steps(run: Run, only: str = "", without: str | None = None) -> None:
    """Every engine, job and contestant that no earlier run has measured, each row on disk at once."""
    for engine, names in ENGINES.items():
        if engine != "as written" and run.device.type != "cuda":
            continue
        for job, name in itertools.product(jobs(run.smoke, run.device.type), names):
            if (job.name, name, engine) in run.done or only not in name or (without is not None and without in name):
                continue
            row: dict[str, Any] = {"row": "step", "case": job.name, "contestant": name, "engine": engine, "phase": "step"}
            if run.over(NEEDS[engine]):
                run.rows.add(row | {"row": "left out"})
                print("not reached, run again to go on:", job.name, name, engine, sep="  ")
                continue
            print(job.name, name, engine, sep="  ", flush=True)
            try:
                _measure(run, row, job)
            except Exception as error:  # out of memory at 1000 classes is a result: the others' numbers must not be lost
                print("  failed:", repr(error)[:300], flush=True)
                run.failed(row, error)
            if run.device.type == "cuda" and not run.broken:
                torch.cuda.empty_cache()
