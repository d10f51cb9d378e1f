"""Training steps timed side by side: contestants take turns, so that a busy minute slows all of them alike.

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
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from baselines import TRAINEES, Job, Trainee, inputs
from fastlora.fewshot import memory
from machine import Ceilings, synchronize
from measure import summary
from memory import counts, ready
from step_gate import FEW, drops_out, gate

CHUNK = 50
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


def warm_up(contestant: Trainee) -> None:
    """A step of few images and classes, so that what libraries set up at first use is not timed."""
    if contestant.compiles:  # other shapes would be compiled anew
        contestant.step(*inputs(contestant.job, 0))
        return
    before = contestant.prompts
    contestant.read(before[:4])
    images, labels = inputs(dataclasses.replace(contestant.job, batch=2), 0)
    contestant.step(images, labels.remainder(len(contestant.prompts)))
    contestant.read(before)


def side_by_side(
    job: Job, names: list[str], rounds: int, limits: Ceilings, count: Sequence[str] = (), gated: bool = False
) -> list[dict[str, Any]]:
    """One row a contestant, the floor's first: `rounds` steps each, in turn, twice as many of those that skip padding.

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
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for contestant in contestants.values():
        warm_up(contestant)
    for number in range(1, rounds + 1):
        # the shortest ones again after the longest, so that both stand for the same minutes
        for name in [*contestants, *(name for name in contestants if TRAINEES[name].packs)]:
            contestant = contestants[name]
            timed = seconds_in_chunks if in_chunks(type(contestant), job) else seconds_whole
            times[name].append(timed(contestant, number))
            print(f"{job.name}: {name} {times[name][-1]:.3f} s", flush=True)
    for name, contestant in contestants.items():
        chunks = in_chunks(type(contestant), job)
        timing = summary(times[name], "chunks" if chunks else "clock")
        row = {"row": "step", **job.row(), "contestant": name, "phase": "step", **timing.row()}
        row |= {"all_ms": [round(t * 1e3, 3) for t in times[name]]}
        if "frozen" in times:
            row["over_frozen"] = timing.median / statistics.median(times["frozen"])
        if name in count and not chunks:
            row |= counts(contestant)
            row["share_of_gemm_speed"] = row["flops"] / timing.median / limits.flops
        rows.append(row)
    return rows
