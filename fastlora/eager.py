"""The op on torch's own matrix products: one packed base product, the rank-R parts added with beta = 1, nothing dense.

    y  = x Wᵀ + bias + scale · s Bᵀ,   s = D(x) Aᵀ
    ds = scale · dy B;   dB = scale · dyᵀ s;   dA = dsᵀ D(x);   dx = dy W + Dᵀ(ds A)

The algebra of the Triton kernels, for CPUs and wherever Triton does not serve; on a GPU it is cuBLAS with beta = 1, the
strongest design published, which the kernels must beat. On a CPU fastlora.thin computes the products with R columns where it
serves. Same two functions as fastlora.kernels.lora_linear; no autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import rng, thin
from .config import OpSpec
from .products import linear

__all__ = ["backward", "forward"]


# On a CPU masks are made and used for so many bytes of x at a time: they stay in the last-level cache.
_CHUNK = 2**22


class _Dropout:
    """D of each active group: the bits of all are drawn at once, the multipliers a few rows at a time, and none are kept."""

    def __init__(self, x: Tensor, spec: OpSpec, seed: Tensor | None, rows: Tensor | None) -> None:
        self.on = seed is not None and rng.drop_rate(spec.dropout) > 0
        if not self.on:
            return
        assert seed is not None
        self.x, self.p = x, spec.dropout
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        self.bits = rng.drop_bytes(seed, spec.site, spec.active_groups, rows, x.shape[1], spec.dropout)
        wide = self.bits.shape[2] * 8
        self.step = len(x) if x.device.type != "cpu" else max(1, _CHUNK // (wide * x.element_size()))
        self.buffer = x.new_empty(min(self.step, len(x)), wide)

    def chunks(self) -> Iterator[slice]:
        """The rows of x, so many at a time."""
        for start in range(0, len(self.x), max(self.step, 1)):
            yield slice(start, min(start + self.step, len(self.x)))

    def multiplier(self, i: int, rows: slice) -> Tensor:
        """What the rows of x are multiplied with in the i-th active group; good until the next call."""
        out = self.buffer[: rows.stop - rows.start]
        return rng.multiplier(self.bits[i, rows], self.x.shape[1], self.p, self.x.dtype, out)


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
    a, b = a.to(x.dtype), b.to(x.dtype)
    y = linear(x, weight, bias)
    s = _shrink(x, a, spec, seed, rows)
    for s_g, b_g, (_, columns) in zip(s.split(a.shape[1], 1), b.chunk(len(a)), spec.spans(len(weight)), strict=True):
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
    columns = [columns for _, columns in spec.spans(len(weight))]
    ds, db = _expand_backward(dy, s, b.to(x.dtype), columns, need_dx or need_da, need_db)
    db = db.mul_(spec.scale).to(b.dtype) if need_db and db is not None else None
    if ds is None or not (need_dx or need_da):
        return None, None, db
    dx = linear(dy, weight.T) if need_dx else None
    da = _shrink_backward(ds.mul_(spec.scale), x, a.to(x.dtype), dx, spec, seed, rows, need_da)
    return dx, da.to(a.dtype) if need_da and da is not None else None, db


def _shrink(x: Tensor, a: Tensor, spec: OpSpec, seed: Tensor | None, rows: Tensor | None) -> Tensor:
    """s = D(x) Aᵀ, (M, g·R)."""
    rank = a.shape[1]
    if thin.serves(x, rank, x.shape[1]):
        return thin.shrink(x, a, *_mask(spec, seed, rows))
    drop = _Dropout(x, spec, seed, rows)
    if not drop.on:
        return x @ a.flatten(0, 1).T
    s = x.new_empty(len(x), len(a) * rank)
    for chunk in drop.chunks():
        for i, a_g in enumerate(a):
            s[chunk, i * rank : (i + 1) * rank] = drop.multiplier(i, chunk).mul_(x[chunk]) @ a_g.T
    return s


def _shrink_backward(
    ds: Tensor, x: Tensor, a: Tensor, dx: Tensor | None, spec: OpSpec, seed: Tensor | None, rows: Tensor | None, need_da: bool
) -> Tensor | None:
    """dA = dsᵀ D(x), (g, R, K), and dx += Dᵀ(ds A)."""
    rank = a.shape[1]
    if thin.serves(x, rank, x.shape[1]):
        return thin.shrink_backward(ds, x, a, dx, *_mask(spec, seed, rows))
    drop = _Dropout(x, spec, seed, rows)
    if not drop.on:
        if dx is not None:
            dx.addmm_(ds, a.flatten(0, 1))
        return (ds.T @ x).view(a.shape) if need_da else None
    # a sum over chunks: not in 16 bits
    da = torch.zeros(a.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) if need_da else None
    product = x.new_empty(min(drop.step, len(x)), x.shape[1])
    for chunk in drop.chunks():
        for i, ds_g in enumerate(ds[chunk].split(rank, 1)):
            multiplier = drop.multiplier(i, chunk)
            if dx is not None:
                dx[chunk].addcmul_(torch.mm(ds_g, a[i], out=product[: len(ds_g)]), multiplier)
            if da is not None:
                da[i] += ds_g.T @ multiplier.mul_(x[chunk])
    return da


def _expand_backward(
    dy: Tensor, s: Tensor, b: Tensor, columns: list[slice], need_ds: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dy B (M, g·R) and dyᵀ s (g·N/G, R), for g groups that lie in these columns of dy."""
    rank = b.shape[1]
    if thin.serves(dy, rank, columns[0].stop - columns[0].start):
        return thin.expand_backward(dy, s, b, [some.start for some in columns])
    ds = db = None
    if need_ds:
        ds = torch.cat([linear(dy[:, some], b_g.T) for some, b_g in zip(columns, b.chunk(len(columns)), strict=True)], 1)
    if need_db:  # (sᵀ dy)ᵀ: on a CPU four times as fast as dyᵀ s
        db = torch.cat([(s_g.T @ dy[:, some]).T for s_g, some in zip(s.split(rank, 1), columns, strict=True)])
    return ds, db


def _mask(spec: OpSpec, seed: Tensor | None, rows: Tensor | None) -> tuple[Any, ...]:
    """What fastlora.thin draws masks by: no seed where nothing is dropped."""
    return seed if rng.drop_rate(spec.dropout) > 0 else None, rows, spec.dropout, spec.site, list(spec.active_groups)
