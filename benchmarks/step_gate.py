"""Before a training step is timed: its logits and gradients against the fp64 truth, at a few images and classes.

The truth needs no attention or adapter code of anyone: the host's own forward with its packed weight replaced by
W + scale · B A, differentiated by autograd in fp64. The same formula in the contestant's own precision is the plain form that
the error rule of fastlora.testing compares with.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import Adapters, Job, Trainee, host, inputs, starting_adapters
from baselines.common import blocks, gather
from baselines.frozen import Frozen
from baselines.full import FullFineTuning
from fastlora.testing import budget_report


def _merged_forward(job: Job, adapters: Adapters, dtype: torch.dtype, half: torch.dtype | None) -> dict[str, Tensor]:
    """Logits and adapter gradients of the host with every in_proj_weight replaced by W + scale · B A."""
    model = host(job).requires_grad_(False).to(dtype)
    leaves = {k: tuple(t.to(dtype).requires_grad_() for t in pair) for k, pair in adapters.items()}
    weights = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for tower, rows in blocks(model).items():
        for block, row in enumerate(rows):
            deltas = [leaves[tower, block, i][1] @ leaves[tower, block, i][0] for i in range(3)]
            weight = row.attn.in_proj_weight
            weights[names[id(weight)]] = weight + job.scale * torch.cat(deltas)
    images, labels = inputs(job, 0)
    tokens = Frozen(job, adapters).tokens
    with torch.autocast(job.device, half or torch.float16, enabled=half is not None):
        image, text, _ = torch.func.functional_call(model, weights, (images.to(dtype), tokens))
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    logits = 100.0 * F.normalize(image.to(exact), dim=-1) @ F.normalize(text.to(exact), dim=-1).T
    flat = [t for pair in leaves.values() for t in pair]
    grads = iter(torch.autograd.grad(F.cross_entropy(logits, labels), flat))
    return gather({key: (next(grads), next(grads)) for key in leaves}) | {"logits": logits.detach()}


def _plain(trainee: type[Trainee], job: Job, adapters: Adapters, dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits and gradients of a contestant that is the host itself (frozen, or all weights trained), in another precision."""
    exact: type[Trainee] = type("Exact", (trainee,), {"cast_once": False})
    contestant = exact(job, adapters)
    contestant.model.to(dtype)
    images, labels = inputs(job, 0)
    image, text = (F.normalize(f, dim=-1) for f in contestant.features(images.to(dtype)))
    logits = 100.0 * image @ text.T
    F.cross_entropy(logits, labels).backward()
    return contestant.gradients() | {"logits": logits.detach()}


@functools.lru_cache(maxsize=4)
def _expected(job: Job, trains: str, half: torch.dtype | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    adapters = starting_adapters(job, host(job))
    if trains == "adapters":
        eager = _merged_forward(job, adapters, torch.float32, half)
        return eager, _merged_forward(job, adapters, torch.float64, None)
    trainee = Frozen if trains == "nothing" else FullFineTuning
    return tuple(_plain(trainee, job, adapters, dtype) for dtype in (torch.float32, torch.float64))  # type: ignore[return-value]


def gate(trainee: type[Trainee], job: Job) -> list[tuple[bool, str]]:
    """For logits and each tower's gradients whether they are within the error budget, and a line; dropout off."""
    small = dataclasses.replace(job, classes=4, batch=4, dropout=0.0)
    contestant = trainee(small, starting_adapters(small, host(small)))
    images, labels = inputs(small, 0)
    logits = contestant.logits(images)
    F.cross_entropy(logits.float(), labels).backward()
    got = contestant.gradients() | {"logits": logits.detach()}
    half = contestant.compute_dtype if contestant.compute_dtype != torch.float32 else None
    return budget_report(got, *_expected(small, trainee.trains, half), contestant.compute_dtype)
