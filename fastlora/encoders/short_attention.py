"""Attention over short sequences on a CPU by kernels/short_attention.c: a sequence and a head at a time, P in the first cache.

As dispatcher ops, so that fake tensors and counters of FLOPs see them.
"""

from __future__ import annotations

from ctypes import c_int64
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import cpu
from .packing import Sequences

__all__ = ["attend", "attend_pooled", "serves"]

# Keys of a query, beyond which P no longer lies in the first cache and torch's flash kernel is as fast.
_MOST_KEYS = 64
# A head's columns come in whole vectors of the widest kind.
_COLUMNS = 16


def serves(q: Tensor, heads: int, width: int, sequences: Sequences) -> bool:
    """Whether the kernel attends with these q, `width` columns wide: float32 on a CPU, few keys."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and sequences.prefix + sequences.longest <= _MOST_KEYS
        and width // heads % _COLUMNS == 0
        and cpu.available()
    )


def attend(qkv: Tensor, heads: int, sequences: Sequences) -> Tensor:
    """softmax(q kᵀ / √d) v of qkv (M, 3D) -> (M, D); backward keeps qkv alone. No readers."""
    return _Attend.apply(qkv, heads, sequences)


def attend_pooled(q: Tensor, kv: Tensor, heads: int, sequences: Sequences) -> Tensor:
    """One query q (n, D) a sequence over its rows of kv (M, 2D) and the prefix -> (n, D); backward keeps q and kv alone."""
    return _AttendPooled.apply(q, kv, heads, sequences)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, sequences: Sequences) -> Tensor:
        qkv = _rows(qkv)
        ctx.save_for_backward(qkv)
        ctx.constants = _constants(heads, sequences, pooled=False)
        return torch.ops.fastlora.short_attention(*qkv.chunk(3, 1), *ctx.constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (qkv,) = ctx.saved_tensors
        gradient = qkv.new_empty(qkv.shape)
        torch.ops.fastlora.short_attention_backward(_rows(dy), *qkv.chunk(3, 1), *gradient.chunk(3, 1), *ctx.constants)
        return gradient, None, None


class _AttendPooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, heads: int, sequences: Sequences) -> Tensor:
        q, kv = _rows(q), _rows(kv)
        ctx.save_for_backward(q, kv)
        ctx.constants = _constants(heads, sequences, pooled=True)
        return torch.ops.fastlora.short_attention(q, *kv.chunk(2, 1), *ctx.constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, kv = ctx.saved_tensors
        dq, dkv = q.new_empty(q.shape), kv.new_empty(kv.shape)
        torch.ops.fastlora.short_attention_backward(_rows(dy), q, *kv.chunk(2, 1), dq, *dkv.chunk(2, 1), *ctx.constants)
        return dq, dkv, None, None


def _rows(x: Tensor) -> Tensor:
    """x with its columns side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def _constants(heads: int, sequences: Sequences, pooled: bool) -> tuple[int, int, list[int], bool, bool]:
    """What the ops take beside tensors."""
    return heads, sequences.prefix, [n for run in sequences.runs for n in run], sequences.causal, pooled


_ARGUMENTS = "int heads, int prefix, int[] runs, bool causal, bool pooled"
torch.library.define("fastlora::short_attention", f"(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> Tensor")
torch.library.define(
    "fastlora::short_attention_backward",
    f"(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, {_ARGUMENTS}) -> ()",
)


@torch.library.register_fake("fastlora::short_attention")
def _forward_fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.impl("fastlora::short_attention", "CPU")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, heads: int, prefix: int, runs: list[int], causal: bool, pooled: bool
) -> Tensor:  # fmt: skip
    out = q.new_empty(q.shape)
    _call(q, k, v, out, None, (), heads, prefix, runs, causal, pooled)
    return out


@torch.library.register_fake("fastlora::short_attention_backward")
def _backward_fake(*_: Any) -> None:
    return None


@torch.library.impl("fastlora::short_attention_backward", "CPU")
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, heads: int, prefix: int, runs: list[int],
    causal: bool, pooled: bool,
) -> None:  # fmt: skip
    _call(q, k, v, None, dy, (dq, dk, dv), heads, prefix, runs, causal, pooled)


def _call(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor | None, dy: Tensor | None, gradients: tuple[Tensor, ...], heads: int,
    prefix: int, runs: list[int], causal: bool, pooled: bool,
) -> None:  # fmt: skip
    dq, dk, dv = gradients or (None, None, None)
    cpu.call(
        "fastlora_attend",
        q, q.stride(0), k, v, k.stride(0), out, dy, _stride(dy if out is None else out), dq, _stride(dq), dk, dv, _stride(dk),
        heads, q.shape[1] // heads, prefix, (c_int64 * len(runs))(*runs), len(runs) // 2, causal, pooled,
    )  # fmt: skip


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
