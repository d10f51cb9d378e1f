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
    """D of each active group for the rows of x: the decisions as bits, a multiplier (M, K) when asked for."""

    def __init__(self, x: Tensor, spec: OpSpec, seed: Tensor | None, rows: Tensor | None) -> None:
        self.bits: Tensor | None = None
        self.x, self.spec = x, spec
        if seed is not None and rng.drop_rate(spec.dropout) > 0:
            rows = torch.arange(len(x), device=x.device) if rows is None else rows
            groups = tuple(group for group, active in zip(spec.groups, spec.active, strict=True) if active)
            self.bits = rng.drop_bytes(seed, spec.site, groups, rows, x.shape[1], spec.dropout)

    def multiplier(self, i: int) -> Tensor:
        """What the i-th active group multiplies x with, (M, K), a fresh tensor."""
        assert self.bits is not None
        return rng.multiplier(self.bits[i], self.x.shape[1], self.spec.dropout, self.x.dtype)


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
    if drop.bits is not None:
        s = x.new_empty(len(x), len(a) * rank)
        for i in range(len(a)):
            s[:, i * rank : (i + 1) * rank] = drop.multiplier(i).mul_(x) @ a[i].T
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
    if drop.bits is None:
        if dx is not None:
            dx.addmm_(ds, a_x.flatten(0, 1))
        if da is not None:
            torch.mm(ds.T, x, out=da.view(-1, x.shape[1]))
    else:
        for i, ds_g in enumerate(ds.split(rank, 1)):
            multiplier = drop.multiplier(i)
            if dx is not None:
                dx.addcmul_(ds_g @ a_x[i], multiplier)
            if da is not None:
                torch.mm(ds_g.T, multiplier.mul_(x), out=da[i])
    return dx, None if da is None else da.to(a.dtype), db
