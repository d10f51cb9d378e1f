"""The op on torch's own matrix products: one packed base product, the rank-R parts added with beta = 1, nothing dense.

    y  = x Wᵀ + bias + scale · s Bᵀ,   s = D(x) Aᵀ
    ds = scale · dy B;   dB = scale · dyᵀ s;   dA = dsᵀ D(x);   dx = dy W + Dᵀ(ds A)

The algebra of the Triton kernels, for CPUs and wherever Triton does not serve; on a GPU it is cuBLAS with beta = 1, the
strongest design published, which the kernels must beat. Same two functions as fastlora.kernels.lora_linear; no autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rng
from .config import OpSpec

__all__ = ["backward", "forward"]


class _Dropout:
    """D of each group for the rows of x, drawn when asked for and not kept."""

    def __init__(self, x: Tensor, spec: OpSpec, seed: Tensor | None, rows: Tensor | None) -> None:
        self.on = seed is not None and rng.drop_rate(spec.dropout) > 0
        self.x, self.spec, self.seed = x, spec, seed
        if self.on:
            self.rows = torch.arange(len(x), device=x.device) if rows is None else rows

    def multiplier(self, group: int) -> Tensor:
        """What x is multiplied with, (M, K), a fresh tensor."""
        assert self.seed is not None
        x, spec = self.x, self.spec
        return rng.keep_multiplier(self.seed, spec.site, group, self.rows, x.shape[1], spec.dropout, x.dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    spec: OpSpec,
    seed: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K), bias (N,), a (g, R, K), b (g·N/G, R), rows (M,) -> y (M, N), s (M, g·R), of x's dtype."""
    rank = a.shape[1]
    a, b = a.to(x.dtype), b.to(x.dtype)
    y = F.linear(x, weight, bias)
    drop = _Dropout(x, spec, seed, rows)
    spans = spec.spans(len(weight))
    if drop.on:
        s = x.new_empty(len(x), len(a) * rank)
        for i, (group, _) in enumerate(spans):
            s[:, i * rank : (i + 1) * rank] = drop.multiplier(group).mul_(x) @ a[i].T
    else:
        s = x @ a.flatten(0, 1).T
    for s_g, b_g, (_, columns) in zip(s.split(rank, 1), b.chunk(len(a)), spans, strict=True):
        y[:, columns].addmm_(s_g, b_g.T, alpha=spec.scale)
    return y, s


def backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    spec: OpSpec,
    seed: Tensor | None,
    rows: Tensor | None,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy (M, N) and what forward took and saved -> dx (M, K), da, db in the dtypes of x, a and b; None where not needed."""
    need_dx, need_da, need_db = needs
    rank = a.shape[1]
    a_x, b_x = a.to(x.dtype), b.to(x.dtype)
    spans = spec.spans(len(weight))
    dy_of = [dy[:, columns] for _, columns in spans]

    db = None
    if need_db:
        parts = [(dy_g.T @ s_g).mul_(spec.scale) for dy_g, s_g in zip(dy_of, s.split(rank, 1), strict=True)]
        db = torch.cat(parts).to(b.dtype)
    if not (need_dx or need_da):
        return None, None, db

    ds = torch.cat([(dy_g @ b_g).mul_(spec.scale) for dy_g, b_g in zip(dy_of, b_x.chunk(len(a)), strict=True)], 1)
    dx = dy @ weight if need_dx else None
    da = torch.empty_like(a_x) if need_da else None
    drop = _Dropout(x, spec, seed, rows)
    if not drop.on:
        if dx is not None:
            dx.addmm_(ds, a_x.flatten(0, 1))
        if da is not None:
            torch.mm(ds.T, x, out=da.view(-1, x.shape[1]))
    else:
        for i, (ds_g, (group, _)) in enumerate(zip(ds.split(rank, 1), spans, strict=True)):
            multiplier = drop.multiplier(group)
            if dx is not None:
                dx.addcmul_(ds_g @ a_x[i], multiplier)
            if da is not None:
                torch.mm(ds_g.T, multiplier.mul_(x), out=da[i])
    return dx, None if da is None else da.to(a.dtype), db
