"""Before a training step is timed: its logits and gradients against the fp64 truth, at a few images and classes.

The truth needs no attention or adapter code of anyone: the host's own forward with its packed weight replaced by
W + scale · B A, differentiated by autograd in fp64. The same formula in the contestant's own precision is the plain form that
the error rule of fastlora.testing compares with.

That rule was made for one op, whose largest error over many entries hardly depends on chance. In a whole step the errors of all
entries hang together: the rounding of a few logits scales every gradient, so the largest error of one batch is close to one
random number, and two equally good orders of summation differ by factors of 0.3 to 2.4 (textbook, dense, ours on 8 batches of
the mini model; mean 1.0). The rule is about the error to be expected; the mean over DRAWS batches, each with its own images,
labels and prompts, estimates that on both sides:

    mean_d max|got_d - truth_d| ≤ 2 · mean_d max|plain_d - truth_d| + 4 · eps · mean_d max|truth_d|

Errors of equal expectation then differ by less than 2 but for luck of three standard deviations: log max|error| of one batch
varies by about 0.4, the ratio of two means over 6 by 0.4 · √(2/6) = 0.23, and log 2 = 0.69. Seen: 0.6 to 1.5.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import Adapters, Job, Trainee, few_prompts, host, inputs, starting_adapters
from baselines.common import blocks, gather
from baselines.frozen import Frozen
from baselines.full import packed_gradients
from fastlora.testing import expected_budget_report

DRAWS = 6
FEW = 3  # images and classes of a draw: a ViT-B-32 is checked in seconds
Results = dict[str, Tensor]


def _merged(job: Job, adapters: Adapters, dtype: torch.dtype, half: torch.dtype | None) -> list[Results]:
    """Of each draw: logits and adapter gradients of the host with every in_proj_weight replaced by W + scale · B A."""
    model = host(job).requires_grad_(False).to(dtype)
    leaves = {k: tuple(t.to(dtype).requires_grad_() for t in pair) for k, pair in adapters.items()}
    names = {id(p): name for name, p in model.named_parameters()}
    tokenize = Frozen(job, adapters).tokenize
    found = []
    for draw in range(DRAWS):
        weights = {}
        for tower, rows in blocks(model).items():
            for block, row in enumerate(rows):
                deltas = [leaves[tower, block, i][1] @ leaves[tower, block, i][0] for i in range(3)]
                weight = row.attn.in_proj_weight
                weights[names[id(weight)]] = weight + job.scale * torch.cat(deltas)
        images, labels = inputs(job, draw)
        tokens = tokenize(few_prompts(job, draw)).to(job.device)
        with torch.autocast(job.device, half or torch.float16, enabled=half is not None):
            image, text, _ = torch.func.functional_call(model, weights, (images.to(dtype), tokens))
        exact = torch.float64 if dtype is torch.float64 else torch.float32
        logits = 100.0 * F.normalize(image.to(exact), dim=-1) @ F.normalize(text.to(exact), dim=-1).T
        grads = iter(torch.autograd.grad(F.cross_entropy(logits, labels), [t for pair in leaves.values() for t in pair]))
        found.append(gather({key: (next(grads), next(grads)) for key in leaves}) | {"logits": logits.detach()})
    return found


def _results(contestant: Trainee, dtype: torch.dtype | None = None) -> list[Results]:
    """Of each draw: a contestant's logits and gradients. dtype: that of the host itself in another precision."""
    job, found = contestant.job, []
    for draw in range(DRAWS):
        images, labels = inputs(job, draw)
        contestant.read(few_prompts(job, draw))
        if dtype is None:
            logits = contestant.logits(images)
        else:
            features = contestant.image_features(images.to(dtype)), contestant.text_features()
            image, text = (F.normalize(f, dim=-1) for f in features)
            logits = 100.0 * image @ text.T
        F.cross_entropy(logits if dtype else logits.float(), labels).backward()
        found.append({k: v.clone() for k, v in contestant.gradients().items()} | {"logits": logits.detach()})
        contestant.model.zero_grad(set_to_none=True)
    return found


class _Host(Frozen):
    """The host itself, with every gradient that is asked of the contestants without adapters: one pass serves them all."""

    cast_once = False

    def install(self, adapters: Adapters) -> None:
        super().install(adapters)
        for rows in blocks(self.model).values():
            for row in (rows[0], rows[-1]):  # the gradients of other weights are not looked at
                row.attn.in_proj_weight.requires_grad_(True)

    def gradients(self) -> dict[str, Tensor]:
        return super().gradients() | packed_gradients(self)


@functools.lru_cache(maxsize=2)
def _plain(job: Job, dtype: torch.dtype) -> list[Results]:
    """The results of the host itself in another precision."""
    contestant = _Host(job, {})
    contestant.model.to(dtype)
    return _results(contestant, dtype)


@functools.lru_cache(maxsize=4)
def _expected(job: Job, trains: str, half: torch.dtype | None) -> tuple[list[Results], list[Results]]:
    if trains == "adapters":
        adapters = starting_adapters(job)
        return _merged(job, adapters, torch.float32, half), _merged(job, adapters, torch.float64, None)
    kind = "dx" if trains == "nothing" else "dW"

    def of(dtype: torch.dtype) -> list[Results]:
        return [{k: v for k, v in found.items() if kind in k or k == "logits"} for found in _plain(job, dtype)]

    return of(torch.float32), of(torch.float64)


def gate(trainee: type[Trainee], job: Job) -> list[tuple[bool, str]]:
    """For logits and each tower's gradients whether they are within the error budget, and a line; dropout off."""
    small = dataclasses.replace(job, classes=FEW, batch=FEW, dropout=0.0)
    contestant = trainee(small, starting_adapters(small))
    half = contestant.compute_dtype if contestant.compute_dtype != torch.float32 else None
    eager, truth = _expected(small, trainee.trains, half)
    return expected_budget_report(_results(contestant), eager, truth, contestant.compute_dtype)


@torch.no_grad()
def drops_out(contestant: Trainee) -> bool:
    """Whether two passes over the same batch differ, as they must with dropout (a host may ignore it silently)."""
    job = dataclasses.replace(contestant.job, batch=2, classes=2)
    images, _ = inputs(job, 0)
    before = contestant.prompts
    contestant.read(few_prompts(job, 0))
    first, second = ((contestant.image_features(images), contestant.text_features()) for _ in range(2))
    contestant.read(before)
    return all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
