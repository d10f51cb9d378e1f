"""Attention over packed rows: no padding, each sequence within itself.

On a CPU our own kernel where sequences are short, else torch's, once per distinct length; on a GPU torch's varlen attention,
xformers' block-diagonal kernels where torch's do not run, else one scaled_dot_product_attention per distinct length.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import short_attention
from .packing import Sequences

__all__ = ["attend", "attend_pooled", "kernel"]


def attend(qkv: Tensor, heads: int, sequences: Sequences) -> Tensor:
    """softmax(q kᵀ / √d) v of every row within its sequence.

    Args:
        qkv: (M, 3D), q, k and v side by side.
        heads: H; D is a multiple of it.

    Returns:
        (M, D).
    """
    width = qkv.shape[1] // 3
    if sequences.readers:
        own, readers = qkv.split([len(qkv) - sequences.readers, sequences.readers])
        inner = Sequences(sequences.runs, sequences.causal, sequences.prefix, 0, sequences.offsets, sequences.masks)
        read = attend_pooled(readers[:, :width], own[:, width:], heads, inner)
        return torch.cat([attend(own, heads, inner), read])
    if kernel(qkv) == "cpu":
        if short_attention.serves(qkv, heads, width, sequences):
            return short_attention.attend(qkv, heads, sequences)
        return _AttendOnCPU.apply(qkv, heads, sequences)
    q, kv = qkv.split([width, 2 * width], 1)
    if not sequences.prefix:
        return _attend(q, kv, None, heads, sequences)
    size = [sequences.prefix, len(qkv) - sequences.prefix]
    (q_first, q_own), (kv_first, kv_own) = q.split(size), kv.split(size)
    first = _attend(q_first, kv_first, None, heads, Sequences(((1, sequences.prefix),), causal=True))
    return torch.cat([first, _attend(q_own, kv_own, kv_first, heads, sequences)])


def attend_pooled(q: Tensor, kv: Tensor, heads: int, sequences: Sequences) -> Tensor:
    """One query for each sequence, over all of its rows and the prefix.

    Args:
        q: (n, D), in the order of the sequences.
        kv: (M, 2D), k and v side by side, without rows of readers.

    Returns:
        (n, D).
    """
    if kernel(q) == "cpu" and short_attention.serves(q, heads, q.shape[1], sequences):
        return short_attention.attend_pooled(q, kv, heads, sequences)
    first, own = kv.split([sequences.prefix, len(kv) - sequences.prefix])
    return _attend(q, own, first if sequences.prefix else None, heads, sequences, pooled=True)


@functools.cache
def _gpu_kernel(device: torch.device, dtype: torch.dtype) -> str:
    flash = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    if flash and importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return "varlen"
    return "xformers" if _xformers_runs(device, dtype) else "sdpa"


def _xformers_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether xformers has kernels for this GPU and dtype, forward and backward: that it is installed does not say so.

    A wheel built for another CUDA than torch's imports all the same, with a log line, and its operators then refuse every GPU;
    none takes bf16 before sm_80.
    """
    if importlib.util.find_spec("xformers") is None:
        return False
    with torch.inference_mode(False), torch.enable_grad():  # with a gradient to come, it looks for a backward at once
        x = torch.zeros(3, 64, dtype=dtype, device=device, requires_grad=True)
        sequences = Sequences(((1, 1), (1, 2)), causal=True, offsets=torch.tensor([0, 1, 3], device=device, dtype=torch.int32))
        try:
            _xformers(x, torch.cat([x, x], 1), None, 1, sequences, False)
        except (ImportError, NotImplementedError):  # a torch or flash-attn that it does not know; no operator
            return False
    return True


def kernel(x: Tensor) -> str:
    """What computes attention for tensors such as x: "cpu", "varlen", "xformers", or "sdpa" once per distinct length."""
    if torch.compiler.is_compiling():
        return "sdpa"
    if x.device.type == "cpu":
        return "cpu"
    if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16):
        return _gpu_kernel(x.device, x.dtype)
    return "sdpa"


def _attend(q: Tensor, kv: Tensor, prefix: Tensor | None, heads: int, sequences: Sequences, *, pooled: bool = False) -> Tensor:
    """q (M, D) or, pooled, (n, D), over kv (M, 2D) and prefix (P, 2D): what autograd differentiates by itself."""
    head, uniform = q.shape[1] // heads, len(sequences.runs) == 1
    chosen = "sdpa" if (uniform and prefix is None) or head % 8 or head > 256 else kernel(q)
    if chosen in ("varlen", "xformers"):
        run = _varlen if chosen == "varlen" else _xformers
        return run(q, kv, prefix, heads, sequences, pooled)
    runs = [(count, 1 if pooled else length) for count, length in sequences.runs]
    q_runs = q.split([count * length for count, length in runs])
    kv_runs = kv.split([count * length for count, length in sequences.runs])
    outs = []
    for q_run, kv_run, (count, length) in zip(q_runs, kv_runs, runs, strict=True):
        own = kv_run.view(count, -1, *kv_run.shape[1:])
        keys = own if prefix is None else torch.cat([prefix.expand(count, -1, -1), own], 1)
        k, v = keys.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q_heads = q_run.view(count, length, heads, -1).transpose(1, 2)
        mask = _mask(length, prefix, q) if sequences.causal and not pooled and prefix is not None else None
        out = F.scaled_dot_product_attention(q_heads, k, v, mask, is_causal=sequences.causal and not pooled and mask is None)
        outs.append(out.transpose(1, 2).reshape(count * length, -1))
    return outs[0] if uniform else torch.cat(outs)


def _mask(length: int, prefix: Tensor | None, like: Tensor) -> Tensor:
    """Additive (length, P + length): a row reads the prefix, itself and what is before it."""
    first = 0 if prefix is None else len(prefix)
    return like.new_full((length, first + length), -math.inf).triu_(first + 1)


def _with_prefix(kv: Tensor, prefix: Tensor | None, sequences: Sequences) -> tuple[Tensor, Tensor, int]:
    """Keys and values with the prefix before each sequence, their offsets, the longest."""
    assert sequences.offsets is not None, "packed on a GPU"
    if prefix is None:
        return kv, sequences.offsets, sequences.longest
    parts = []
    for kv_run, (count, _) in zip(kv.split([c * n for c, n in sequences.runs]), sequences.runs, strict=True):
        own = kv_run.view(count, -1, kv.shape[1])
        parts.append(torch.cat([prefix.expand(count, -1, -1), own], 1).flatten(0, 1))
    steps = torch.arange(sequences.count + 1, device=kv.device, dtype=torch.int32) * len(prefix)
    return torch.cat(parts), sequences.offsets + steps, sequences.longest + len(prefix)


def _varlen(q: Tensor, kv: Tensor, prefix: Tensor | None, heads: int, sequences: Sequences, pooled: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    keys, starts, longest = _with_prefix(kv, prefix, sequences)
    k, v = keys.unflatten(1, (2, heads, -1)).unbind(1)
    assert sequences.offsets is not None, "packed on a GPU"
    q_starts, q_longest = sequences.offsets, sequences.longest
    if pooled:
        q_starts, q_longest = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32), 1
    window = (-1, 0) if sequences.causal and not pooled else (-1, -1)
    out: Any = varlen_attn(q.unflatten(1, (heads, -1)), k, v, q_starts, starts, q_longest, longest, window_size=window)
    return out.flatten(1)


def _xformers(q: Tensor, kv: Tensor, prefix: Tensor | None, heads: int, sequences: Sequences, pooled: bool) -> Tensor:
    from xformers.ops import memory_efficient_attention

    keys, _, _ = _with_prefix(kv, prefix, sequences)
    k, v = keys.unflatten(1, (2, heads, -1)).unbind(1)
    mask = _block_mask(sequences, 0 if prefix is None else len(prefix), pooled, q.device)
    return memory_efficient_attention(q.unflatten(1, (heads, -1))[None], k[None], v[None], attn_bias=mask)[0].flatten(1)


def _block_mask(sequences: Sequences, first: int, pooled: bool, device: torch.device) -> Any:
    """xformers' mask of these sequences after `first` rows of prefix: made once, as all layers share it."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    key = (first, pooled, device)
    if key not in sequences.masks:
        lengths = [length for count, length in sequences.runs for _ in range(count)]
        queries = [1] * len(lengths) if pooled else lengths
        mask = BlockDiagonalMask.from_seqlens(queries, [first + length for length in lengths], device=device)
        causal = sequences.causal and not pooled
        sequences.masks[key] = mask.make_causal_from_bottomright() if causal else mask
    return sequences.masks[key]


class _AttendOnCPU(torch.autograd.Function):
    """Each run in place by torch's own CPU kernel, one gradient buffer for all: no stack, no cat, no zero-filled slices."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, sequences: Sequences) -> Tensor:
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        logsumexps = []
        for rows, q, k, v, mask, causal in _runs(qkv, heads, sequences):
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            part, logsumexp = flash(q, k, v, 0.0, causal, attn_mask=mask)
            logsumexps.append(logsumexp)
            _heads(out[rows], part.shape[0], heads, 1)[0].copy_(part)
        ctx.save_for_backward(qkv, out, *logsumexps)
        ctx.heads, ctx.sequences = heads, sequences
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, *logsumexps = ctx.saved_tensors
        heads, prefix = ctx.heads, ctx.sequences.prefix
        gradient = torch.empty_like(qkv)
        for i, (rows, q, k, v, mask, causal) in enumerate(_runs(qkv, heads, ctx.sequences)):
            dy_run = _heads(dy[rows], len(q), heads, 1)[0]
            out_run = _heads(out[rows], len(q), heads, 1)[0]
            dq, dk, dv = _backward(dy_run, q, k, v, out_run, logsumexps[i], mask, causal)
            if dk.shape[2] > dq.shape[2]:  # what the sequences read of the prefix
                shared = _heads(gradient[:prefix], 1, heads, 3)[1:]
                shared += torch.stack([dk[:, :, :prefix].sum(0), dv[:, :, :prefix].sum(0)])[:, None]
                dk, dv = dk[:, :, prefix:], dv[:, :, prefix:]
            for target, part in zip(_heads(gradient[rows], len(q), heads, 3), (dq, dk, dv), strict=True):
                target.copy_(part)
        return gradient, None, None


def _heads(rows: Tensor, count: int, heads: int, parts: int) -> Tensor:
    """A view of rows (count · length, parts · D): (parts, count, H, length, d)."""
    return rows.view(count, -1, parts, heads, rows.shape[1] // (parts * heads)).permute(2, 0, 3, 1, 4)


def _runs(qkv: Tensor, heads: int, sequences: Sequences) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None, bool]]:
    """For the prefix, then each run: its rows, q, k, v (count, H, length, d), the additive mask, whether plainly causal."""
    prefix = sequences.prefix
    if prefix:
        q, k, v = _heads(qkv[:prefix], 1, heads, 3)
        yield slice(0, prefix), q, k, v, None, True
        first = qkv[:prefix]
    start = prefix
    for count, length in sequences.runs:
        rows = slice(start, start + count * length)
        q, k, v = _heads(qkv[rows], count, heads, 3)
        if prefix:
            k, v = (
                torch.cat([shared.expand(count, -1, -1, -1), own], 2)
                for shared, own in zip(_heads(first, 1, heads, 3)[1:], (k, v), strict=True)
            )
        mask = _mask(length, first[:, :1], qkv) if prefix and sequences.causal else None
        yield rows, q, k, v, mask, sequences.causal and mask is None
        start = rows.stop


def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, mask: Tensor | None, causal: bool
) -> Iterable[Tensor]:
    """dq, dk, dv of one run. 16-bit tensors are cast: torch's kernel then takes a third of the time, and rounds less."""
    if q.dtype in (torch.bfloat16, torch.float16):
        dy, q, k, v, out = (t.float() for t in (dy, q, k, v, out))
        mask = None if mask is None else mask.float()
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dy, q, k, v, out, logsumexp, 0.0, causal, attn_mask=mask
    )
