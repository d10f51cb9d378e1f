"""Parts c and g: whole training steps of ViT-B/16, as written, captured in a CUDA graph, or compiled.

Each contestant passes the step's gate, warms up, then its steps are timed one by one with CUDA events. A row keeps their
median, their quantiles and the peak memory; at 100 classes a second one tells where the time goes. "graph" is the whole
step, optimizer included, captured once and replayed on two batches in turn.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import expected
import expected.steps as counted
from baselines import TRAINEES, Job, Trainee, inputs
from fastlora.kernels.compile import NEEDS, Config
from measure import Timing, by_clock, by_events
from step_gate import FEW
from steps import checked

from .ahead import needed, packed, tower
from .items import Item, Needed, Row
from .run import Run

__all__ = ["captured", "items"]

WARM_UP, STEPS = 8, 60
LIMIT = 12.0  # seconds for the timed steps of one contestant: of one that takes longer fewer are timed
MODEL = "ViT-B-16-quickgelu"
WIDTHS = 768, 512  # of its image and text towers
PROFILED = 100  # classes at which a contestant's step as written is profiled: each profile takes seconds
# Ours first, then whoever targets speak of; the ways in which each is run.
WAYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("fastlora", ("graph", "as written")),
    ("the paper's arithmetic", ("as written", "graph")),
    ("full fine-tuning", ("as written", "graph")),
    ("cuBLAS beta=1", ("as written", "graph")),
    ("textbook", ("as written", "graph")),
    ("PEFT", ("as written", "graph")),
    ("fastlora, share_prefix", ("graph",)),
    ("fastlora, host's encoders", ("graph", "as written")),
)
COMPILED = (("textbook", 100), ("textbook", 10))  # (contestant, classes) of part g
# What an item takes beside its steps: model, adapters and optimizer, its gate the first time, the profile; a capture.
SETUP, GATE, CAPTURE, INDUCTOR = 2.0, 4.0, 1.0, 75.0
Step = Callable[[], object]


def jobs(smoke: bool, device: str) -> list[Job]:
    """The recipe's batch of 32 at 10, 100 and 1000 classes."""
    if smoke:
        return [Job("mini", classes=3, batch=2, device=device, depth=2, width=64)]
    return [Job(MODEL, classes=classes, device=device) for classes in (10, 100, 1000)]


def _needed(job: Job, name: str, arch: int) -> tuple[Needed, ...]:
    """What a step of one of ours starts, its gate and `drops_out` before it, whose images and classes are few."""

    def config(rows: int, width: int, dropout: bool, identities: bool) -> Config:
        rate = job.dropout if dropout else 0.0
        return packed(arch, torch.bfloat16, rows, width, job.rank, rate, identities=identities)

    image, text = WIDTHS
    if name == "fastlora, host's encoders":  # whole prompts, and every row by its number
        sizes = ((job.batch, job.classes, True, "both"), (FEW, FEW, False, "both"), (2, 2, True, "forward"))
        whole = [
            (config(count * length, width, dropout, False), directions)
            for images, prompts, dropout, directions in sizes
            for count, length, width in ((images, counted.IMAGE_TOKENS, image), (prompts, counted.CONTEXT, text))
        ]
        return tuple(
            needed(one, None, directions, needs)
            for one, directions in whole
            for needs in (NEEDS[0], (False, True, True))
        )  # fmt: skip
    shared = name == "fastlora, share_prefix"
    prompts = counted.TOKENS[job.classes] - (counted.SHARED * (job.classes - 1) if shared else 0)
    found = [
        *tower(config(job.batch * counted.IMAGE_TOKENS, image, True, False), job.batch),
        *tower(config(prompts, text, True, True), job.classes),
        *tower(config(FEW * counted.IMAGE_TOKENS, image, False, False), FEW),
        *tower(config(2 * counted.IMAGE_TOKENS, image, True, False), 2, "forward"),
        *tower(config(16 if shared else 21, text, True, True), 2, "forward"),
    ]
    for rows in (31, 37):  # the gate's draws are of different lengths: a program more or less is a kernel of its own
        found += tower(config(rows, text, False, True), FEW)
    return tuple(dict.fromkeys(found))


def items(part: str, arch: int, device: str, smoke: bool) -> list[Item]:
    """An item for each job, contestant and way: of part c those of WAYS, of part g those that Inductor compiles."""
    found = []
    every = jobs(smoke, device)
    chosen = [(job, name, way) for job, (name, ways) in itertools.product(every, WAYS) for way in ways]
    if part == "g":  # not on a CPU, where Inductor takes a minute and more for each
        chosen = [(job, name, "compile") for name, n in COMPILED for job in every if job.classes == n and device != "cpu"]
    gated: set[str] = set()
    for job, name, engine in chosen:
        ours = name.startswith("fastlora")
        step = 0.0 if smoke else expected.step(job.classes, name, engine).both / 1e6
        seconds = SETUP + min(LIMIT, STEPS * step) + WARM_UP * step
        seconds += GATE * (name not in gated) + CAPTURE * (engine == "graph") + INDUCTOR * (engine == "compile")
        gated.add(name)
        found.append(
            Item(
                part,
                f"{job.name}, {name}, {engine}",
                seconds,
                functools.partial(measure, job, name, engine),
                needs=_needed(job, name, arch) if ours and not smoke else (),
                calls=WARM_UP + STEPS if ours else 0,
                about={"case": job.name, "contestant": name, "engine": engine},
            )
        )
    return found


def captured(contestant: Trainee, images: Tensor, labels: Tensor) -> Step:
    """Forward, backward and AdamW as one CUDA graph, which reads these two tensors; on a CPU the same function again."""
    step = functools.partial(contestant.captured_step, images, labels)
    if images.device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own: beside what the warm-up left 1000 classes would not fit
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _step(contestant: Trainee, engine: str) -> Step:
    """One step on the next of two batches."""
    batches = itertools.cycle([inputs(contestant.job, number) for number in (1, 2)])
    if engine == "graph":
        images, labels = (t.clone() for t in next(batches))
        replay = captured(contestant, images, labels)

        def step() -> None:
            for target, value in zip((images, labels), next(batches), strict=True):
                target.copy_(value)
            replay()

        return step
    if engine == "compile":
        contestant.loss = torch.compile(contestant.loss, dynamic=False)  # type: ignore[method-assign]
    return lambda: contestant.step(*next(batches))


def _timed(run: Run, step: Step) -> Timing:
    if run.device.type != "cuda":
        return by_clock([step], run.device, 0.0, least=1)
    start = time.monotonic()
    for _ in range(WARM_UP):
        step()
        torch.cuda.synchronize()
        if time.monotonic() - start > LIMIT:
            break
    return by_events([step], LIMIT, most=STEPS)


def _profile(step: Step) -> list[Row]:
    """The thirty kernels that take most of a step, in microseconds, and all of them together."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
    # an annotation spans kernels that are there themselves
    rows = sorted((e for e in events if not getattr(e, "is_user_annotation", False)), key=lambda e: -e.self_device_time_total)
    top = [{"kernel": e.key[:120], "us": round(e.self_device_time_total, 1), "calls": e.count} for e in rows[:30]]
    total = {"us": round(sum(e.self_device_time_total for e in rows), 1), "calls": sum(e.count for e in rows)}
    return [{"kernel": "all", **total}, *top]


def measure(job: Job, name: str, engine: str, run: Run) -> Iterator[Row]:
    """The time and the peak memory of one contestant's step; then, on a GPU, where the time goes."""
    row: Row = {"row": "step", **job.row(), "phase": "step"}
    if (reason := TRAINEES[name].missing()) is not None:
        yield row | {"skipped": reason}
        return
    try:
        contestant = checked(name, job)
    except AssertionError as error:
        yield row | {"refused": [str(error)[:2000]]}
        return
    memory: Row = {}
    cuda = run.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        memory["held_bytes"] = torch.cuda.memory_allocated()
    step = _step(contestant, engine)
    timing = _timed(run, step)
    if cuda:
        memory |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    yield row | timing.row() | memory
    if cuda and engine == "as written" and job.classes == PROFILED:
        yield {"row": "profile", "kernels": _profile(step)}
