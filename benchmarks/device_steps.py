"""`benchmarks/device.py --step`: whole training steps of ViT-B/16 on a GPU, every way of adapting it, every engine for it.

Each contestant passes the step's gate, takes 20 steps, then 200 are timed one by one with CUDA events; a row keeps their median
and quantiles, peak memory, and where the time goes, kernel by kernel. "graph" is the whole step, optimizer included, captured
once and replayed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from baselines import TRAINEES, Job, Trainee, inputs
from measure import Timing, by_clock, by_events, peak_memory
from memory import ready
from step_gate import drops_out, gate

if TYPE_CHECKING:
    from device import Run

WARM_UP, STEPS = 20, 200
ALL = ("as written", "compile", "graph")
ENGINES = {"fastlora": ALL, "fastlora, share_prefix": ALL, "textbook": ("as written", "compile")}
Step = Callable[[], object]


def jobs(smoke: bool, device: str) -> list[Job]:
    """The recipe's batch of 32 at 10, 100 and 1000 classes."""
    if smoke:
        return [Job("mini", classes=3, batch=2, device=device)]
    return [Job("ViT-B-16", classes=classes, device=device) for classes in (10, 100, 1000)]


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
    for _ in range(WARM_UP):
        step()
    # as many of the 200 as the budget allows: the row says how many
    return by_events([step], max(run.left() - 15, 1.0), most=STEPS)


def _measure(run: Run, job: Job, name: str, engine: str) -> dict[str, Any]:
    trainee = TRAINEES[name]
    if (reason := trainee.missing()) is not None:
        return {"skipped": reason}
    if red := [line for ok, line in gate(trainee, job) if not ok]:
        return {"refused": red}
    contestant = ready(trainee, job)
    if trainee.trains == "adapters" and not drops_out(contestant):
        return {"refused": ["dropout is ignored"]}
    with peak_memory(run.device) as peak:
        step = _step(contestant, engine, job)
        timing = _timed(run, step)
    profile = {"profile": _profile(step)} if run.device.type == "cuda" else {}
    return timing.row() | peak | profile


def measure_steps(run: Run) -> None:
    """Every job, contestant and engine that no earlier run has measured, each row on disk at once."""
    for job in jobs(run.smoke, run.device.type):
        for name in TRAINEES:
            for engine in ENGINES.get(name, ("as written",)):
                key = (job.name, name, engine)
                row: dict[str, Any] = {"row": "step", "case": job.name, "contestant": name, "engine": engine, "phase": "step"}
                if key in run.done or (engine != "as written" and run.device.type != "cuda"):
                    continue
                if run.left() < 60 and not run.smoke:
                    run.rows.add({"row": "left out", "case": list(key)})
                    print("not reached, run again to go on:", *key, sep="  ")
                    continue
                try:
                    found = _measure(run, job, name, engine)
                except Exception as error:  # out of memory at 1000 classes is a result: the others' numbers must not be lost
                    found = {"failed": repr(error)[:2000]}
                run.rows.add(row | dataclasses.asdict(job) | found)
                print(*key, found.get("median_ms", found), sep="  ", flush=True)
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
