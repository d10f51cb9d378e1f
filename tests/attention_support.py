"""Attention over packed rows by its definition: what every kernel is compared with."""

from __future__ import annotations

import math

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
