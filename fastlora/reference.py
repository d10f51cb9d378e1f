"""The equations in plain PyTorch, any dtype, differentiable by autograd: the truth that every backend is tested against.

y = x Wᵀ + bias + scale · (D(x) Aᵀ) Bᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rng
from .config import OpSpec

__all__ = ["lora_linear"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    spec: OpSpec,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """x (M, K), weight (N, K), bias (N,), a (g, R, K), b (g·N/G, R), rows (M,) -> y (M, N), of x's dtype."""
    y = torch.nn.functional.linear(x, weight, bias)
    updates = [torch.zeros_like(part) for part in y.chunk(len(spec.active), 1)]
    for a_g, b_g, (group, columns) in zip(a, b.chunk(len(a)), spec.spans(len(weight)), strict=True):
        d_x = x
        if seed is not None and rng.drop_rate(spec.dropout) > 0:
            identity = torch.arange(len(x), device=x.device) if rows is None else rows
            d_x = x * rng.keep_multiplier(seed, spec.site, group, identity, x.shape[1], spec.dropout, x.dtype)
        s = d_x @ a_g.to(x.dtype).T
        updates[columns.start // (columns.stop - columns.start)] = spec.scale * s @ b_g.to(x.dtype).T
    return y + torch.cat(updates, 1)
