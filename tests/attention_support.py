"""Attention over packed rows by its definition, what every kernel is compared with, and stand-ins for the kernels of a GPU."""

from __future__ import annotations

import inspect
import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.encoders.packing import Sequences

HEADS = 2
NO_WHEEL = "no xformers: the dev extra has it where it has a wheel, on Linux with an x86 CPU"


def one_sequence(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(L, D) over (S, D), by the definition; causal with the diagonal at the bottom right."""
    q, k, v = (t.unflatten(1, (HEADS, -1)).transpose(0, 1) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        late = torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1 + scores.shape[2] - scores.shape[1])
        scores = scores.masked_fill(late, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def bounds(sequences: Sequences) -> list[tuple[int, int]]:
    """First row and end of each sequence."""
    starts, start = [], sequences.prefix
    for count, length in sequences.runs:
        for _ in range(count):
            starts.append((start, start + length))
            start += length
    return starts


def reference(qkv: Tensor, sequences: Sequences) -> Tensor:
    """Row by row what the docstring of Sequences says."""
    q, k, v = qkv.chunk(3, 1)
    first = slice(0, sequences.prefix)
    parts = [one_sequence(q[first], k[first], v[first], True)] if sequences.prefix else []
    reads = []
    for start, end in bounds(sequences):
        keys, values = (torch.cat([t[first], t[start:end]]) for t in (k, v))
        parts.append(one_sequence(q[start:end], keys, values, sequences.causal))
        if sequences.readers:
            row = slice(sequences.prefix + sequences.body + len(reads), sequences.prefix + sequences.body + len(reads) + 1)
            reads.append(one_sequence(q[row], keys, values, False))
    return torch.cat(parts + reads)


def reference_pooled(q: Tensor, kv: Tensor, sequences: Sequences) -> Tensor:
    k, v = kv.chunk(2, 1)
    first = slice(0, sequences.prefix)
    return torch.cat(
        [
            one_sequence(row[None], torch.cat([k[first], k[start:end]]), torch.cat([v[first], v[start:end]]), False)
            for row, (start, end) in zip(q, bounds(sequences), strict=True)
        ]
    )


def reads(sequences: Sequences) -> Tensor:
    """(rows, rows), whether a row reads another: what the docstring of Sequences says, as a dense mask."""
    prefix, body, readers = sequences.prefix, sequences.body, sequences.readers
    mask = torch.zeros(prefix + body + readers, prefix + body + readers, dtype=torch.bool)
    mask[:, :prefix] = True
    mask[:prefix, :prefix].tril_()
    for place, (start, end) in enumerate(bounds(sequences)):
        mask[start:end, start:end] = True
        if sequences.causal:
            mask[start:end, start:end].tril_()
        if readers:
            mask[prefix + body + place, start:end] = True
    return mask


def make(runs: tuple[tuple[int, int], ...], causal: bool, prefix: int, readers: bool) -> Sequences:
    count = sum(c for c, _ in runs)
    offsets = torch.tensor([length for c, length in runs for _ in range(c)]).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), offsets]).to(torch.int32)
    return Sequences(runs, causal, prefix, count if readers else 0, offsets)


CASES = {
    "images": make(((3, 5),), False, 0, False),
    "prompts": make(((2, 1), (3, 4), (1, 7)), True, 0, False),
    "shared prefix": make(((2, 1), (3, 4), (1, 7)), True, 3, False),
    "one length, shared prefix": make(((4, 2),), True, 2, False),
    "more tokens than a head is wide": make(((2, 3), (2, 12)), True, 0, False),
    "readers": make(((2, 2), (1, 6)), True, 0, True),
    "readers, shared prefix": make(((2, 2), (1, 6)), True, 4, True),
}


def fake_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn as documented; flash attention's causal diagonal is at the bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size in ((-1, 0), (-1, -1))
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    assert len(query) == cu_seq_q[-1] and len(key) == len(value) == cu_seq_k[-1] and query.shape[1:] == key.shape[1:]
    q, k, v = (t.flatten(1).tensor_split([int(c) for c in cu[1:-1]]) for t, cu in
               ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k)))  # fmt: skip
    return torch.cat([one_sequence(*qkv, window_size == (-1, 0)) for qkv in zip(q, k, v, strict=True)]).view_as(query)


def stand_in(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Put what "varlen" or "xformers" is documented to do in its place: neither has a kernel for a CPU."""
    if kernel == "varlen":
        module: Any = types.ModuleType("torch.nn.attention.varlen")
        module.varlen_attn = fake_varlen
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        return
    ops = pytest.importorskip("xformers.ops", reason=NO_WHEEL)
    signature = inspect.signature(ops.memory_efficient_attention)

    def attend(*args: Any, **named: Any) -> Tensor:
        """By xformers' own masks made dense."""
        given = signature.bind(*args, **named).arguments
        inputs = ops.fmha.Inputs(**given)  # refuses what the real function has no such argument for
        inputs.validate_inputs()
        q, k, v = (t.transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
        mask = inputs.attn_bias.materialize((q.shape[2], k.shape[2]), q.dtype)
        return ((q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setattr(ops, "memory_efficient_attention", attend)
