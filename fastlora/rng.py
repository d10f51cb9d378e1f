"""The dropout mask as a pure function of (seed, site, group, row identity, column), in plain PyTorch.

Counter-based: Philox-4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, who show
that 7 rounds pass BigCrush). Nothing is drawn in sequence, so the mask does not depend on how rows are packed, ordered or
sharded, and backward draws the same bits again instead of storing them.

    key     = (seed low word, seed high word ^ site * 0x9E3779B9)
    counter = (row identity, column // 128, group, plane)

One call gives 4 x 32 bits: one *bit plane* for 128 columns; column c has bit (c % 32) // 4 + 8 * (c % 4) of word
(c % 128) // 32, so that on a GPU one shift puts four neighbours' bits on the signs of a word's four bytes. A probability is
rounded to j / 2**k with k <= 8; plane i holds bit i of a k-bit number u, and an element is dropped when u < j. The folding is
bitwise, 32 decisions at a time. fastlora.kernels.dropout draws the same bits on a GPU, kernels/thin.c on a CPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["bit_planes", "drop_bytes", "drop_rate", "keep_mask", "keep_multiplier", "multiplier"]

ROUNDS = 7
MAX_PLANES = 8
COLUMNS_PER_CALL = 128
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# (distance, mask): a word's bits under the mask change places with those so far above. So do bits 0 and 1 of a bit's number,
# then 0 and 3, 1 and 2, 1 and 4: what was 8 * (c % 4) + c // 4 becomes c.
_SWAPS = ((1, 0x22222222), (7, 0x00AA00AA), (2, 0x0C0C0C0C), (14, 0x0000CCCC))


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


def _philox(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox-4x32-7 on 32-bit words held in int64: four words whose low 32 bits count; all broadcast against each other.

    A product of two words wraps at 2**64, so that its low and high halves are the two words wanted. A word that is only
    exclusive-ored next may carry anything above its low half; one that is multiplied next is cut first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ (c1 ^ k0)) & _WORD
        c2 = ((product0 >> 32) ^ (c3 ^ k1)) & _WORD
        c1, c3 = product1, product0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def drop_bytes(seed: Tensor, site: int, groups: tuple[int, ...], rows: Tensor, columns: int, p: float) -> Tensor:
    """Drop decisions of G groups, uint8 (G, M, ceil(columns / 128) * 16): bit c % 8 of byte c // 8 is set where dropped.

    Arguments as in `keep_multiplier`, whose first step this is; drop_rate(p) must not be 0. All groups are drawn together: what
    their counters have in common is computed once.
    """
    j, planes = bit_planes(p)
    seed = seed.reshape(())
    key = (seed & _WORD, ((seed >> 32) & _WORD) ^ ((site * _WEYL[0]) & _WORD))
    blocks = -(-columns // COLUMNS_PER_CALL)
    # (group, plane, block, row): each word has the axes it depends on and grows by broadcasting, so that two and a half of the
    # seven rounds cost next to nothing; rows come last, where torch's loops are long
    counter = [
        (rows.to(torch.int64) & _WORD).view(1, 1, 1, -1),
        torch.arange(blocks, device=rows.device).view(1, 1, -1, 1),
        torch.stack([torch.full((), group, device=rows.device) for group in groups]).view(-1, 1, 1, 1),
        torch.arange(planes, device=rows.device).view(1, -1, 1, 1),
    ]
    drop = torch.empty(len(groups), rows.numel(), blocks, 4, dtype=torch.int32, device=rows.device)
    for i, word in enumerate(_philox(counter, key)):
        bits = word.expand(len(groups), planes, blocks, -1).to(torch.int32)
        drop[..., i] = _fold(bits, j).transpose(1, 2)
    for distance, mask in _SWAPS:
        moved = (drop >> distance).bitwise_xor_(drop).bitwise_and_(mask)
        drop.bitwise_xor_(moved).bitwise_xor_(moved.bitwise_left_shift_(distance))
    return drop.view(torch.uint8).flatten(2)


def _fold(bits: Tensor, j: int) -> Tensor:
    """u < j for the numbers u whose bit i is bits[:, i], 32 at a time: int32 (G, planes, …) -> (G, …)."""
    less = ~bits[:, 0]  # least significant first; j is odd
    for plane in range(1, bits.shape[1]):
        zero = ~bits[:, plane]
        # a set bit of j makes a zero bit of u smaller, a clear one keeps what is smaller already
        less = zero | less if (j >> plane) & 1 else zero & less
    return less


@functools.lru_cache(maxsize=32)
def _byte_table(p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): what each of 8 columns is multiplied with, for every byte of drop decisions."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return torch.where(bits == 1, 0.0, 1.0 / (1.0 - drop_rate(p))).to(dtype)


def multiplier(drop: Tensor, columns: int, p: float, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """One group's drop decisions (M, bytes) as what x is multiplied with: (M, columns) of `dtype`.

    Args:
        out: (M, 8 * bytes) of `dtype`, contiguous, to be written to; a fresh tensor if None.
    """
    table = _byte_table(p, dtype, drop.device)
    out = torch.empty(len(drop), 8 * drop.shape[1], dtype=dtype, device=drop.device) if out is None else out
    torch.index_select(table, 0, drop.flatten().to(torch.int32), out=out.view(-1, 8))
    return out[:, :columns]


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
