"""LoRA's thin products on a CPU by kernels/thin.c, which reads x once for all groups and draws the mask as it goes.

    s = D(x) Aᵀ        dA = dsᵀ D(x),  dx += Dᵀ(ds A)        ds = dy B,  dBᵀ = sᵀ dy

As dispatcher ops, so that fake tensors and counters of FLOPs see them. Where `serves` is not true, fastlora.eager takes torch's
own products.
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor

from . import cpu, rng

__all__ = ["expand_backward", "serves", "shrink", "shrink_backward"]

# Above it the products are no longer thin: a BLAS is as fast.
_MOST_RANK = 16
# The columns of a group come in whole vectors of the widest kind.
_COLUMNS = 16


def serves(x: Tensor, rank: int, width: int) -> bool:
    """Whether the kernels take x (M, K) and groups of `width` columns at this rank: float32 on a CPU, few ranks."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and rank <= _MOST_RANK
        and width % _COLUMNS == 0
        and x.stride(1) == 1
        and cpu.available()
    )


def shrink(x: Tensor, a: Tensor, seed: Tensor | None, rows: Tensor | None, p: float, site: int, groups: list[int]) -> Tensor:
    """s = D(x) Aᵀ (M, g·R) of x (M, K), a (g, R, K); the mask as in `fastlora.rng.keep_multiplier`, none where seed is None."""
    return torch.ops.fastlora.shrink(x, a, seed, rows, p, site, groups)


def shrink_backward(
    ds: Tensor, x: Tensor, a: Tensor, dx: Tensor | None, seed: Tensor | None, rows: Tensor | None, p: float, site: int,
    groups: list[int],
) -> Tensor:  # fmt: skip
    """dA = dsᵀ D(x) (g, R, K); Dᵀ(ds A) is added to dx (M, K). Arguments as in `shrink`, ds (M, g·R)."""
    return torch.ops.fastlora.shrink_backward(ds, x, a, dx, seed, rows, p, site, groups)


def expand_backward(dy: Tensor, s: Tensor, b: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    """dy B (M, g·R) and dyᵀ s (g·w, R), of dy (M, N), s (M, g·R), b (g·w, R) and the first of each group's w columns of dy."""
    return torch.ops.fastlora.expand_backward(dy, s, b, starts)


def _call(
    x: Tensor, k: int, a: Tensor, starts: list[int], *, s: Tensor | None = None, ds: Tensor | None = None,
    dx: Tensor | None = None, da: Tensor | None = None, seed: Tensor | None = None, rows: Tensor | None = None, p: float = 0.0,
    site: int = 0, groups: list[int] | None = None,
) -> None:  # fmt: skip
    g, r, _ = a.shape
    a = a.contiguous()
    ds = None if ds is None else ds.contiguous()
    rows = None if rows is None else rows.to(torch.int64).contiguous()
    j, planes = (0, 0) if seed is None else rng.bit_planes(p)
    array = c_int64 * g
    cpu.call(
        "fastlora_thin",
        x, x.stride(0), len(x), k, a, s, ds, dx, da, array(*starts), g, r, rows, array(*(groups or [0] * g)),
        0 if seed is None else int(seed), site, j, planes, 1.0 / (1.0 - j / 2**planes),
    )  # fmt: skip


_MASK = "Tensor? seed, Tensor? rows, float p, int site, int[] groups"
torch.library.define("fastlora::shrink", f"(Tensor x, Tensor a, {_MASK}) -> Tensor")
torch.library.define("fastlora::shrink_backward", f"(Tensor ds, Tensor x, Tensor a, Tensor(a!)? dx, {_MASK}) -> Tensor")
torch.library.define("fastlora::expand_backward", "(Tensor dy, Tensor s, Tensor b, int[] starts) -> (Tensor, Tensor)")


@torch.library.register_fake("fastlora::shrink")
def _shrink_fake(x: Tensor, a: Tensor, *_: Any) -> Tensor:
    return x.new_empty(len(x), a.shape[0] * a.shape[1])


@torch.library.impl("fastlora::shrink", "CPU")
def _shrink(x: Tensor, a: Tensor, seed: Tensor | None, rows: Tensor | None, p: float, site: int, groups: list[int]) -> Tensor:
    s = _shrink_fake(x, a)
    _call(x, x.shape[1], a, [0] * len(a), s=s, seed=seed, rows=rows, p=p, site=site, groups=groups)
    return s


@torch.library.register_fake("fastlora::shrink_backward")
def _shrink_backward_fake(ds: Tensor, x: Tensor, a: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.impl("fastlora::shrink_backward", "CPU")
def _shrink_backward(
    ds: Tensor, x: Tensor, a: Tensor, dx: Tensor | None, seed: Tensor | None, rows: Tensor | None, p: float, site: int,
    groups: list[int],
) -> Tensor:  # fmt: skip
    da = _shrink_backward_fake(ds, x, a)
    _call(x, x.shape[1], a, [0] * len(a), ds=ds, dx=dx, da=da, seed=seed, rows=rows, p=p, site=site, groups=groups)
    return da


@torch.library.register_fake("fastlora::expand_backward")
def _expand_backward_fake(dy: Tensor, s: Tensor, b: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(b)


@torch.library.impl("fastlora::expand_backward", "CPU")
def _expand_backward(dy: Tensor, s: Tensor, b: Tensor, starts: list[int]) -> tuple[Tensor, Tensor]:
    g, rank = len(starts), b.shape[1]
    bt = b.view(g, -1, rank).transpose(1, 2).contiguous()
    ds, dbt = torch.empty_like(s, memory_format=torch.contiguous_format), torch.empty_like(bt)
    _call(dy, bt.shape[2], bt, starts, s=ds, ds=s, da=dbt)
    return ds, dbt.transpose(1, 2).contiguous().view(b.shape)
