"""LoRA's thin products on a CPU by kernels/thin.c, which reads x once for all groups and draws the mask as it goes.

    s = D(x) Aᵀ        dA = dsᵀ D(x),  dx += Dᵀ(ds A)        ds = dy B,  dBᵀ = sᵀ dy

As dispatcher ops, so that fake tensors and counters of FLOPs see them. Where there was no C compiler when the package was
installed, `serves` is never true and fastlora.eager takes torch's own products.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from . import rng

__all__ = ["available", "expand_backward", "lanes", "serves", "shrink", "shrink_backward"]

# Above it the products are no longer thin: a BLAS is as fast.
_MOST_RANK = 16
# The columns of a group come in whole vectors of the widest kind.
_COLUMNS = 16

_ARGUMENTS = (
    c_void_p, c_int64, c_int64, c_int64,  # x, its row stride, m, k
    c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,  # a, s, ds, dx, da
    c_void_p, c_int64, c_int64,  # starts, g, r
    c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, c_float,  # rows, groups, seed, site, j, planes, factor
    c_int, c_int,  # threads, lanes
)  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | None:
    # beside the Triton kernels, without their package: it is a library, no Python module
    spec = importlib.util.find_spec("fastlora.kernels._thin")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.fastlora_thin.argtypes = _ARGUMENTS
    return library


def available() -> bool:
    """Whether the kernels were compiled when the package was installed."""
    return _library() is not None


@functools.cache
def lanes(most: int = 16) -> int:
    """How many floats a vector holds here, `most` at most: 16 with AVX-512, 8 with AVX2, else 4.

    Raises:
        RuntimeError: the kernels are not available.
    """
    library = _library()
    if library is None:
        raise RuntimeError("fastlora.kernels._thin was not compiled: install a C compiler, then fastlora again")
    return library.fastlora_lanes(most)


def serves(x: Tensor, rank: int, width: int) -> bool:
    """Whether the kernels take x (M, K) and groups of `width` columns at this rank: float32 on a CPU, few ranks."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and rank <= _MOST_RANK
        and width % _COLUMNS == 0
        and x.stride(1) == 1
        and available()
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
    library, (g, r, _) = _library(), a.shape
    assert library is not None
    a = a.contiguous()
    ds = None if ds is None else ds.contiguous()
    rows = None if rows is None else rows.to(torch.int64).contiguous()
    j, planes = (0, 0) if seed is None else rng.bit_planes(p)
    array = c_int64 * g
    held = (x, a, s, ds, dx, da, rows)  # alive until the call is over
    x_, a_, s_, ds_, dx_, da_, rows_ = (None if t is None else t.data_ptr() for t in held)
    failed = library.fastlora_thin(
        x_, x.stride(0), len(x), k, a_, s_, ds_, dx_, da_, array(*starts), g, r, rows_, array(*(groups or [0] * g)),
        0 if seed is None else int(seed), site, j, planes, 1.0 / (1.0 - j / 2**planes), torch.get_num_threads(), lanes(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the sums of {g} × {r} × {k} gradients on {torch.get_num_threads()} threads")


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
