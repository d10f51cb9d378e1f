"""The op on torch's own matrix products: one packed base product, the rank-R parts added with beta = 1, nothing dense.

    y  = x Wᵀ + bias + scale · s Bᵀ,   s = D(x) Aᵀ
    ds = scale · dy B;   dB = scale · dyᵀ s;   dA = dsᵀ D(x);   dx = dy W + Dᵀ(ds A)

The algebra of the Triton kernels, for CPUs and wherever Triton does not serve; on a GPU it is cuBLAS with beta = 1, the
strongest design published, which the kernels must beat. Same two functions as fastlora.kernels.lora_linear; no autograd.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import rng
from .config import OpSpec
from .products import linear

__all__ = ["backward", "forward"]


# On a CPU masks are made and used for so many bytes of x at a time: they stay in the last-level cache.
_CHUNK = 2**22
# Thin products on a CPU: all groups side by side up to so many columns, so many rows at a time, the most that oneDNN sums.
_ROWS, _THIN = 1024, 16


class _Dropout:
    """D of each active group: the bits of all are drawn at once, the multipliers a few rows at a time, and none are kept."""

    def __init__(self, x: Tensor, spec: OpSpec, seed: Tensor | None, rows: Tensor | None) -> None:
        self.on = seed is not None and rng.drop_rate(spec.dropout) > 0
        if not self.on:
            return
        assert seed is not None
        self.x, self.p = x, spec.dropout
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        groups = tuple(group for group, active in zip(spec.groups, spec.active, strict=True) if active)
        self.bits = rng.drop_bytes(seed, spec.site, groups, rows, x.shape[1], spec.dropout)
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
    rank = a.shape[1]
    a, b = a.to(x.dtype), b.to(x.dtype)
    y = linear(x, weight, bias)
    drop = _Dropout(x, spec, seed, rows)
    spans = spec.spans(len(weight))
    if drop.on:
        s = x.new_empty(len(x), len(a) * rank)
        for chunk in drop.chunks():
            for i, a_g in enumerate(a):
                s[chunk, i * rank : (i + 1) * rank] = drop.multiplier(i, chunk).mul_(x[chunk]) @ a_g.T
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
    columns = [columns for _, columns in spec.spans(len(weight))]
    ds, db = _low_rank(dy, s, b_x, columns, need_dx or need_da, need_db)
    ds = None if ds is None else ds.mul_(spec.scale)
    db = None if db is None else db.mul_(spec.scale).to(b.dtype)
    if ds is None:
        return None, None, db

    dx = linear(dy, weight.T) if need_dx else None
    da = None
    drop = _Dropout(x, spec, seed, rows)
    if not drop.on:
        if dx is not None:
            dx.addmm_(ds, a_x.flatten(0, 1))
        if need_da:
            da = (ds.T @ x).view(a.shape)
    else:
        # a sum over chunks: not in 16 bits
        da = torch.zeros(a.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) if need_da else None
        product = x.new_empty(min(drop.step, len(x)), x.shape[1])
        for chunk in drop.chunks():
            for i, ds_g in enumerate(ds[chunk].split(rank, 1)):
                multiplier = drop.multiplier(i, chunk)
                if dx is not None:
                    dx[chunk].addcmul_(torch.mm(ds_g, a_x[i], out=product[: len(ds_g)]), multiplier)
                if da is not None:
                    da[i] += ds_g.T @ multiplier.mul_(x[chunk])
    return dx, None if da is None else da.to(a.dtype), db


def _low_rank(
    dy: Tensor, s: Tensor, b: Tensor, columns: list[slice], needs_ds: bool, needs_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dy B (M, g·R) and dyᵀ s (g·N/G, R), for g groups that lie in these columns of dy."""
    rank = b.shape[1]
    own = [(slice(i * rank, (i + 1) * rank), some) for i, some in enumerate(columns)]
    # all groups side by side, of which all but the blocks on the diagonal is thrown away, is still the fastest on a CPU if thin
    thin = dy.device.type == "cpu" and dy.dtype == torch.float32 and 1 < len(own) <= _THIN // rank
    step = _ROWS if thin else max(1, len(dy))
    ds = dy.new_empty(s.shape) if needs_ds else None
    sums = dy.new_zeros(s.shape[1], dy.shape[1]) if needs_db and thin else None
    for start in range(0, len(dy), step):
        rows = slice(start, start + step)
        if ds is not None:
            for (place, some), b_g in zip(own, b.chunk(len(own)), strict=True):
                ds[rows, place] = linear(dy[rows, some], b_g.T)
        if sums is not None:
            sums += linear(s[rows].T.contiguous(), dy[rows].T)
    if not needs_db:
        return ds, None
    # (sᵀ dy)ᵀ: on a CPU four times as fast as dyᵀ s
    return ds, torch.cat([(s[:, place].T @ dy[:, some] if sums is None else sums[place, some]).T for place, some in own])
