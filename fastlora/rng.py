"""The dropout mask as a pure function of (seed, site, group, row identity, column), in plain PyTorch.

Counter-based: Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, who show
that 7 rounds pass BigCrush). Nothing is drawn in sequence, so the mask does not depend on how rows are packed, ordered or
sharded, and backward draws the same bits again instead of storing them.

    key     = (seed low word, seed high word ^ site * 0x9E3779B9)
    counter = (row identity, column // 128, group, plane)

One call gives 4 x 32 bits: one *bit plane* for 128 columns; column c has bit c % 32 of word (c % 128) // 32. A probability is
rounded to j / 2**k with k <= 8; plane i holds bit i of a k-bit number u, and an element is dropped when u < j. The folding is
bitwise, 32 decisions at a time. fastlora.kernels.dropout draws the same bits on a GPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["bit_planes", "drop_bytes", "drop_rate", "keep_mask", "keep_multiplier", "multiplier"]

ROUNDS = 7
MAX_PLANES = 8
COLUMNS_PER_CALL = 128
_CALLS_AT_ONCE = 1536  # of one plane of one group on a CPU: 18 ms for 1600 rows of 768 and three groups, 35 ms without
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def bit_planes(p: float) -> tuple[int, int]:
    """The (j, k) of the probability j / 2**k nearest to p, in lowest terms, with k <= 8 and j / 2**k < 1.

    0.25 gives (1, 2), 0.5 gives (1, 1), 0.1 gives (13, 7); a p under 1/512 rounds to (0, 0), no dropout.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {p}")
    j, k = min(round(p * 2**MAX_PLANES), 2**MAX_PLANES - 1), MAX_PLANES
    while k and j % 2 == 0:
        j, k = j // 2, k - 1
    return j, k


def drop_rate(p: float) -> float:
    """The probability with which elements are really dropped when p is asked for: p rounded to j / 2**k."""
    j, k = bit_planes(p)
    return j / 2**k


def _philox(x: Tensor, y: Tensor, key: Tensor) -> Tensor:
    """Philox-4x32-7 on unsigned 32-bit values held in int64.

    x (2, ...) holds words 0 and 2 of each counter, y words 1 and 3, key (2, 1, ...) both key words; gives (2, 2, ...): x and y.
    """
    shape = (2, *(1,) * (x.ndim - 1))
    factors, weyl = (torch.tensor(v, device=x.device).view(shape) for v in (_MULTIPLIERS, _WEYL))
    for _ in range(ROUNDS):
        product = factors * x  # wraps modulo 2**64, so all of its bits are right
        x, y = ((product >> 32) & _WORD).flip(0) ^ y ^ key, (product & _WORD).flip(0)
        key = (key + weyl) & _WORD
    return torch.stack([x, y])


def drop_bytes(seed: Tensor, site: int, groups: tuple[int, ...], rows: Tensor, columns: int, p: float) -> Tensor:
    """Drop decisions of several groups, uint8 (G, M, ceil(columns / 128) * 16): bit c % 8 of byte c // 8 is set where dropped.

    Arguments as in `keep_multiplier`, whose first step this is; drop_rate(p) must not be 0. All groups are drawn together,
    because small tensors cost by the call.
    """
    j, planes = bit_planes(p)
    device = rows.device
    seed = seed.reshape(())
    key = torch.stack([seed & _WORD, ((seed >> 32) & _WORD) ^ ((site * _WEYL[0]) & _WORD)]).view(2, 1, 1, 1, 1)
    blocks = torch.arange(-(-columns // COLUMNS_PER_CALL), device=device)
    # words 2 and 3 of the counter: (G, planes, 1, 1)
    group, plane = (
        t[:, :, None, None]
        for t in torch.meshgrid(torch.tensor(groups, device=device), torch.arange(planes, device=device), indexing="ij")
    )
    if len(rows) == 0:
        return torch.empty(len(groups), 0, len(blocks) * 16, dtype=torch.uint8, device=device)
    shape = (len(groups), planes, -1, len(blocks))
    parts = []
    for part in rows.split(max(1, _CALLS_AT_ONCE // len(blocks))) if device.type == "cpu" else (rows,):
        row = (part.to(torch.int64) & _WORD)[:, None]
        x, y = (
            torch.stack([first.expand(*shape[:2], len(part), shape[3]), second.expand(*shape[:2], len(part), shape[3])])
            for first, second in ((row, group), (blocks, plane))
        )
        # (4, G, planes, m, blocks), words 0, 1, 2, 3 in order
        words = _philox(x, y, key).transpose(0, 1).flatten(0, 1)
        # u < j, bit by bit, least significant plane first: a set bit of j makes a zero bit of u smaller, a clear one keeps what
        # is smaller already
        drop = ~words[:, :, 0]  # j is odd
        for i in range(1, planes):
            drop = ~words[:, :, i] | drop if (j >> i) & 1 else ~words[:, :, i] & drop
        # (G, m, blocks, 4): little-endian words, so byte b of the row covers columns 8 b to 8 b + 7
        parts.append((drop & _WORD).movedim(0, -1).contiguous().to(torch.uint32).view(torch.uint8).flatten(2))
    return torch.cat(parts, 1)


@functools.lru_cache(maxsize=32)
def _byte_table(p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): what each of 8 columns is multiplied with, for every byte of drop decisions."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return torch.where(bits == 1, 0.0, 1.0 / (1.0 - drop_rate(p))).to(dtype)


def multiplier(drop: Tensor, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """One group's drop decisions (M, bytes) as what x is multiplied with: (M, columns) of `dtype`."""
    return torch.nn.functional.embedding(drop.to(torch.int32), _byte_table(p, dtype, drop.device)).flatten(1)[:, :columns]


def keep_multiplier(seed: Tensor, site: int, group: int, rows: Tensor, columns: int, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies x with: 0 where dropped, 1 / (1 - drop_rate(p)) where kept, of `dtype`, (M, columns).

    Args:
        seed: int64 tensor of one element.
        site: which layer this is, 0 <= site < 2**32.
        group: which projection of a packed layer this is (q, k, v are 0, 1, 2).
        rows: integer tensor (M,), the identity of each row, taken modulo 2**32.
        columns: K, the width of x.
        p: probability of dropping, in [0, 1), rounded as in `bit_planes`.
    """
    if drop_rate(p) == 0.0:
        return torch.ones((), dtype=dtype, device=rows.device).expand(len(rows), columns)
    return multiplier(drop_bytes(seed, site, (group,), rows, columns, p)[0], columns, p, dtype)


def keep_mask(seed: Tensor, site: int, group: int, rows: Tensor, columns: int, p: float) -> Tensor:
    """Where dropout keeps an element: bool (M, columns). Arguments as in `keep_multiplier`."""
    return keep_multiplier(seed, site, group, rows, columns, p, torch.float32) != 0
