"""Training steps timed side by side: contestants take turns, so that a busy minute slows all of them alike, and each is
warmed up by whole steps of its own, so that what is timed is the steady state of a training run.

A step whose memory does not fit is timed in chunks of classes. Where padding is computed, every chunk of 50 prompts is the
same work (50 x 77 tokens through the text tower, forward and backward), so one chunk is timed and counted as often as the step
has chunks; the image tower, the loss and the optimizer are timed whole. No product is computed twice, and a step that fitted
would take no less: its caches would be colder. Rows say so: method "chunks".
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from baselines import TRAINEES, Job, Trainee, inputs
from fastlora.fewshot import memory
from machine import Ceilings, synchronize
from measure import summary
from memory import counts, page_faults, ready
from step_gate import FEW, drops_out, gate

CHUNK = 50
# Steps of each contestant (or chunks, where it is timed in chunks) before one is timed. The first maps and clears the pages of
# all memory of a step, the second what lies elsewhere than in the first: alone in a process, fastlora's step of a ViT-B-32 at
# 100 classes has some 160000 page faults, then 37000, then none. A training run has thousands of steps.
WARM_UP = 2
WHOLE = 300  # classes up to which every contestant's step of a ViT-B-32 fits in 24 GB


@functools.cache
def _verdict(name: str, job: Job) -> list[tuple[bool, str]]:
    return gate(TRAINEES[name], job)


def checked(name: str, job: Job) -> Trainee:
    """A contestant ready to be timed.

    Raises:
        AssertionError: its results are wrong, or it draws no dropout mask.
    """
    trainee = TRAINEES[name]
    # the gate looks at few images and classes whatever the job has
    red = [line for ok, line in _verdict(name, dataclasses.replace(job, classes=FEW, batch=FEW)) if not ok]
    assert not red, f"{name} is wrong, so it is not timed: {red}"
    contestant = ready(trainee, job)
    assert trainee.trains != "adapters" or not job.dropout or drops_out(contestant), f"{name} ignores dropout: not timed"
    return contestant


def seconds_of_step(contestant: Trainee, number: int) -> float:
    """The time of one step on batch `number`, whole or from one chunk."""
    return (seconds_in_chunks if in_chunks(type(contestant), contestant.job) else seconds_whole)(contestant, number)


def in_chunks(trainee: type[Trainee], job: Job) -> bool:
    """Whether a step of it is timed in chunks of classes."""
    return job.device == "cpu" and job.model != "mini" and job.classes > WHOLE and not trainee.packs


def seconds_whole(contestant: Trainee, number: int) -> float:
    """Wall time of one step on batch `number`."""
    images, labels = inputs(contestant.job, number)
    start = time.perf_counter()
    contestant.step(images, labels)
    synchronize(torch.device(contestant.job.device))
    return time.perf_counter() - start


def seconds_in_chunks(contestant: Trainee, number: int, size: int = CHUNK) -> float:
    """The time of one step from one chunk of `size` classes (see above)."""
    images, labels = inputs(contestant.job, number)
    start = time.perf_counter()
    image = contestant.image_features(images)
    image.backward(torch.ones_like(image))
    after_image = time.perf_counter()
    text = contestant.text_features(0, size)
    text.backward(torch.ones_like(text))
    after_chunk = time.perf_counter()
    shape = (contestant.job.classes, text.shape[1])
    text = torch.randn(shape, dtype=text.dtype, requires_grad=True)
    logits = 100.0 * F.normalize(image.detach(), dim=-1) @ F.normalize(text, dim=-1).T
    F.cross_entropy(logits.float(), labels).backward()
    if contestant.trained():
        contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
    end = time.perf_counter()
    return (after_image - start) + (after_chunk - after_image) * contestant.job.classes / size + (end - after_chunk)


@dataclasses.dataclass(frozen=True)
class Taken:
    """The timed steps of one contestant, in order: seconds, and the page faults of each (None: the system does not tell)."""

    seconds: list[float]
    page_faults: list[int | None]

    def row(self) -> dict[str, Any]:
        """What a results file keeps beside the summary."""
        return {
            "all_ms": [round(t * 1e3, 3) for t in self.seconds],
            "page_faults": self.page_faults,
            "warm_up": WARM_UP,
        }


def in_turn(takes: dict[str, Callable[[int], float]], rounds: int, title: str) -> dict[str, Taken]:
    """The times of `rounds` steps of each contestant, all taking turns, after WARM_UP turns that are not counted.

    Args:
        takes: by name a function of a batch's number that takes a step (or its chunk) on it and gives the seconds.
    """
    taken = {name: Taken([], []) for name in takes}
    for number in range(1, WARM_UP + rounds + 1):
        for name, take in takes.items():
            before = page_faults()
            seconds = take(number)
            faults = None if before is None else (page_faults() or 0) - before
            print(f"{title}: {name} {seconds:.3f} s{' (warm-up)' if number <= WARM_UP else ''}", flush=True)
            if number > WARM_UP:
                taken[name].seconds.append(seconds)
                taken[name].page_faults.append(faults)
    return taken


def side_by_side(
    job: Job, names: list[str], rounds: int, limits: Ceilings, count: Sequence[str] = (), gated: bool = False
) -> list[dict[str, Any]]:
    """One row a contestant, the floor's first: `rounds` steps of each, in turn, warmed up.

    One that the gate refuses is not timed; its row says why.

    count: those whose FLOPs and saved bytes are counted too, which takes a step more.
    gated: whether the contestants have passed the gate already.
    """
    memory.keep_freed()  # as `fastlora train` does; all contestants gain
    contestants: dict[str, Trainee] = {}
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            contestants[name] = ready(TRAINEES[name], job) if gated else checked(name, job)
        except AssertionError as error:
            print(f"{job.name}: {error}", flush=True)
            rows.append({"row": "step", **job.row(), "contestant": name, "refused": str(error)})
    taken = in_turn({name: functools.partial(seconds_of_step, c) for name, c in contestants.items()}, rounds, job.name)
    times = {name: found.seconds for name, found in taken.items()}
    for name, contestant in contestants.items():
        chunks = in_chunks(type(contestant), job)
        timing = summary(times[name], "chunks" if chunks else "clock")
        row = {"row": "step", **job.row(), "contestant": name, "phase": "step", **timing.row()}
        row |= taken[name].row()
        if "frozen" in times:
            row["over_frozen"] = timing.median / statistics.median(times["frozen"])
        if name in count and not chunks:
            row |= counts(contestant)
            row["share_of_gemm_speed"] = row["flops"] / timing.median / limits.flops
        rows.append(row)
    return rows
