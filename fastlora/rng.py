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

__all__ = ["bit_planes", "drop_rate", "keep_mask", "keep_multiplier"]

ROUNDS = 7
MAX_PLANES = 8
COLUMNS_PER_CALL = 128
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


def _mulhilo(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x, both unsigned 32-bit values held in int64."""
    # constant * x passes 2**63, so the constant is cut into 16-bit halves.
    low = (constant & 0xFFFF) * x
    high = (constant >> 16) * x + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _philox(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox-4x32-7 on unsigned 32-bit values held in int64; the four words broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def _drop_bytes(seed: Tensor, site: int, group: int, rows: Tensor, columns: int, p: float) -> Tensor:
    """Drop decisions as bits, uint8 (M, ceil(columns / 128) * 16): bit c % 8 of byte c // 8 is set where c is dropped."""
    j, planes = bit_planes(p)
    seed = seed.reshape(())
    key = (seed & _WORD, ((seed >> 32) & _WORD) ^ ((site * _WEYL[0]) & _WORD))
    blocks = torch.arange(-(-columns // COLUMNS_PER_CALL), device=rows.device)
    row_word = (rows.to(torch.int64) & _WORD)[:, None]
    drop: Tensor | None = None
    for plane in range(planes):  # least significant first
        fixed = [torch.full_like(blocks, v) for v in (group, plane)]
        words = torch.stack(_philox([row_word, blocks, *fixed], key), -1)
        # u < j, bit by bit: a set bit of j makes a zero bit of u smaller, a clear one keeps what is smaller already
        if (j >> plane) & 1:
            drop = ~words if drop is None else ~words | drop
        else:
            assert drop is not None, "j is odd"
            drop = ~words & drop
    assert drop is not None
    return (drop & _WORD).to(torch.uint32).view(torch.uint8).flatten(1)


@functools.lru_cache(maxsize=32)
def _byte_table(p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): what each of 8 columns is multiplied with, for every byte of drop decisions."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return torch.where(bits == 1, 0.0, 1.0 / (1.0 - drop_rate(p))).to(dtype)


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
    drop = _drop_bytes(seed, site, group, rows, columns, p)
    table = _byte_table(p, dtype, rows.device)
    return torch.nn.functional.embedding(drop.to(torch.int32), table).flatten(1)[:, :columns]


def keep_mask(seed: Tensor, site: int, group: int, rows: Tensor, columns: int, p: float) -> Tensor:
    """Where dropout keeps an element: bool (M, columns). Arguments as in `keep_multiplier`."""
    return keep_multiplier(seed, site, group, rows, columns, p, torch.float32) != 0
