"""A loss of images a few at a time: the image tower then keeps for backward what a few images leave, and computes no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["microbatched"]

PartLoss = Callable[[Tensor, slice], Tensor]


def microbatched(loss: PartLoss, count: int, size: int, shared: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """The sum of loss(shared, rows) over `count` images, `size` at a time: equal to loss(shared, slice(0, count)), to rounding.

    Each part is differentiated as soon as it is computed, and only then the next one begins; `backward()` of the sum hands the
    gradients on. So the loss must be a sum over images, as the cross-entropy of images and class prompts is (divide by the
    number of all images, not by that of a part):

        text = text_encoder(seed, normalize=True)

        def loss(text, rows):
            image = image_encoder(images[rows], seed, normalize=True, ids=ids[rows])
            return F.cross_entropy(100 * image @ text.T, labels[rows], reduction="sum") / len(images)

        microbatched(loss, len(images), 8, text, model.parameters()).backward()

    Parts are differentiated before anybody can scale the sum: for float16 and its GradScaler take the images at once.

    Args:
        loss: of (shared, rows); a scalar. Called once for each part, under autograd.
        count: images in all, at least 1.
        size: images at a time, at least 1.
        shared: what all parts read, such as class features; autograd goes on from here when all parts are done.
        parameters: whatever else the loss depends on and is trained; tensors that it does not reach get no gradient from here.

    Returns:
        A scalar, detached where gradients are off.

    Raises:
        ValueError: a count or size below 1.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be at least 1, got {count} and {size}")
    trained = [p for p in parameters if p.requires_grad]
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    total: Tensor = _Microbatched.apply(loss, parts, shared, *trained)
    return total


class _Microbatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: PartLoss, parts: list[slice], shared: Tensor, *trained: Tensor) -> Tensor:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        leaf = shared.detach().requires_grad_(0 in wanted)
        inputs = [leaf, *trained]
        total = shared.new_zeros((), dtype=torch.promote_types(shared.dtype, torch.float32))
        sums: dict[int, Tensor] = {}
        for rows in parts:
            with torch.set_grad_enabled(bool(wanted)):
                part = loss(leaf, rows)
            total += part.detach()
            if wanted:
                gradients = torch.autograd.grad(part, [inputs[i] for i in wanted], allow_unused=True)
                for i, gradient in zip(wanted, gradients, strict=True):
                    if gradient is not None:
                        sums[i] = sums[i] + gradient if i in sums else gradient
        ctx.sums = sums
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sums is None:
            raise RuntimeError("microbatched gradients were handed on already: compute the loss anew before a second backward")
        sums, ctx.sums = ctx.sums, None  # each goes as it is handed on: together they may be as large as the model
        count = len(ctx.needs_input_grad) - 2
        return None, None, *(sums.pop(i) * dy if i in sums else None for i in range(count))
