"""Sequences packed end to end: which rows a batch becomes, and who each row is.

A row's identity keys its dropout mask: prompt x context length + position for text, image x tokens + position for images. So
the mask does not depend on how a batch is packed, trimmed, ordered or sharded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

__all__ = ["PackedPrompts", "Sequences", "pack", "shared_prefix"]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """How rows (M, D) fall into sequences that attend within themselves.

    The rows are, in this order: `prefix` rows, a causal sequence of their own that all others read; the runs, each `count`
    sequences of `length` rows end to end; `readers` rows, one for each sequence in the same order, which read their whole
    sequence and are read by none (CoCa's class token).

    Args:
        runs: (count, length) of each run.
        causal: whether a row reads only itself and the rows before it in its sequence.
        prefix: number of rows that every sequence reads before its own.
        readers: number of reader rows, 0 or one for each sequence.
        offsets: int32 (count + 1,), where each sequence starts, without prefix; for attention kernels on a GPU.
        masks: what xformers made of them, kept as long as the offsets are: a captured CUDA graph goes on reading both.
    """

    runs: tuple[tuple[int, int], ...]
    causal: bool
    prefix: int = 0
    readers: int = 0
    offsets: Tensor | None = None
    masks: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def count(self) -> int:
        """Number of sequences."""
        return sum(count for count, _ in self.runs)

    @property
    def body(self) -> int:
        """Number of rows in the runs."""
        return sum(count * length for count, length in self.runs)

    @property
    def longest(self) -> int:
        """Length of the longest sequence, without prefix."""
        return max(length for _, length in self.runs)


@dataclasses.dataclass(frozen=True)
class PackedPrompts:
    """Prompts (n, L) as M rows, sorted by length.

    Args:
        tokens: (M,) token ids; -1 at a reader row.
        positions: (M,) where each token stands in its prompt.
        rows: (M,) identity of each row.
        sequences: how the rows attend.
        pooled: (n,) the row of each sequence that becomes its feature.
        order: (n,) the place among the sequences of each prompt given.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    sequences: Sequences
    pooled: Tensor
    order: Tensor


def shared_prefix(tokens: Tensor, lengths: Tensor) -> int:
    """How many first tokens all prompts (n, L) of `lengths` (n,) have in common, leaving each at least one of its own."""
    if len(tokens) < 2:
        return 0
    same = (tokens == tokens[0]).all(0)
    common = int(same.to(torch.int8).cumprod(0).sum())
    return min(common, int(lengths.min()) - 1)


def pack(
    tokens: Tensor,
    lengths: Tensor,
    ids: Tensor,
    *,
    context: int,
    causal: bool,
    prefix: int = 0,
    reader: int | None = None,
) -> PackedPrompts:
    """Prompts end to end, shortest first, so that equally long ones lie side by side.

    Args:
        tokens: (n, L) token ids.
        lengths: (n,) how many tokens of each prompt are kept, from the first; the last one kept is pooled.
        ids: (n,) identity of each prompt.
        context: tokens of a whole prompt as the host numbers them (with a class token if it has one).
        causal: whether a token reads only itself and those before it.
        prefix: number of first tokens that are computed once; their identity is that of prompt 0, whatever `ids` says.
        reader: position of a class token that reads each sequence and is pooled, or None.
    """
    device, n = tokens.device, len(tokens)
    tokens, lengths, ids = tokens.cpu(), lengths.cpu() - prefix, ids.cpu()
    by_length = lengths.argsort(stable=True)
    lengths, ids = lengths[by_length], ids[by_length]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    sequence = torch.arange(n).repeat_interleave(lengths)
    positions = torch.arange(int(offsets[-1])) - offsets[sequence] + prefix
    parts = [(tokens[by_length[sequence], positions], positions, ids[sequence] * context + positions)]
    if prefix:
        first = torch.arange(prefix)
        parts.insert(0, (tokens[0, :prefix], first, first))
    if reader is not None:
        parts.append((torch.full((n,), -1), torch.full((n,), reader), ids * context + reader))
    packed, positions, rows = (torch.cat(column).to(device) for column in zip(*parts, strict=True))

    values, counts = lengths.unique_consecutive(return_counts=True)
    runs = tuple(zip(counts.tolist(), values.tolist(), strict=True))
    offsets_32 = offsets.to(device, torch.int32)
    sequences = Sequences(runs, causal, prefix, 0 if reader is None else n, offsets_32)
    pooled = prefix + (offsets[1:] - 1 if reader is None else offsets[-1] + torch.arange(n))
    return PackedPrompts(packed, positions, rows, sequences, pooled.to(device), by_length.argsort().to(device))
