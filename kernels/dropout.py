"""The bits of fastlora.rng on a GPU: Philox-4x32-7 bit planes, folded to drop decisions, 32 columns a word.

    key     = (seed low word, seed high word ^ site * 0x9E3779B9)
    counter = (row identity, column // 128, group, plane)

One call gives one bit plane of 128 columns, 32 a word; columns 4j to 4j + 3 of a word have bits j, j + 8, j + 16 and j + 24. An
element is kept when the k-bit number u of its planes is at least J, with J / 2**k the drop rate. fastlora.rng derives this.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Inline assembly is for NVIDIA's compiler: neither the interpreter nor AMD's backend runs it.
PTX: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Seven rounds of Philox-4x32 on uint32 tensors c0..c3 of one shape and uint32 scalars k0, k1."""
    for _ in tl.static_range(7):
        # Not tl.philox: with a 64-bit counter it silently runs another generator.
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def load_key(seed_ptr, site):
    """The two key words, uint32 scalars, of an int64 seed in memory and a site."""
    seed = tl.load(seed_ptr)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32) ^ (site.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def load_row_ids(rows_ptr, offs_m, M):
    """The identity of rows offs_m (int64 [BLOCK_M]), modulo 2**32: given in memory, or the row's own number."""
    ids = offs_m
    if rows_ptr is not None:
        ids = tl.load(rows_ptr + offs_m, mask=offs_m < M, other=0)
    return ids.to(tl.uint32)


@triton.jit
def keep_words(k0, k1, group, row_ids, column, J: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """Keep decisions as bits, uint32 [len(row_ids), COLUMNS // 32], for COLUMNS columns from `column` on.

    Both are multiples of 128, so that no drawn bit is thrown away.
    """
    tl.static_assert(COLUMNS % 128 == 0, "a tile under dropout covers whole calls of 128 columns")
    CALLS: tl.constexpr = COLUMNS // 128
    BLOCK_M: tl.constexpr = row_ids.shape[0]
    zero = tl.zeros((BLOCK_M, CALLS), tl.uint32)
    c0 = row_ids[:, None] + zero
    c1 = (column // 128 + tl.arange(0, CALLS))[None, :].to(tl.uint32) + zero
    c2 = group.to(tl.uint32) + zero
    # J is odd: of the lowest plane alone, u >= J where its bit is set
    e0, e1, e2, e3 = philox(c0, c1, c2, zero, k0, k1)
    for plane in tl.static_range(1, PLANES):
        w0, w1, w2, w3 = philox(c0, c1, c2, zero + plane, k0, k1)
        # u >= J, bit by bit: where J has a bit u needs it too, where J has none a bit of u is enough
        if (J >> plane) & 1:
            e0, e1, e2, e3 = w0 & e0, w1 & e1, w2 & e2, w3 & e3
        else:
            e0, e1, e2, e3 = w0 | e0, w1 | e1, w2 | e2, w3 | e3
    # tl.join puts its two operands along a new last axis: [m, call, high, low] is word 2 * high + low.
    words = tl.join(tl.join(e0, e2), tl.join(e1, e3))
    return tl.reshape(words, (BLOCK_M, COLUMNS // 32))


@triton.jit
def drop(tile, words):
    """The tile [BLOCK_M, COLUMNS] with 0 where a bit of the words [BLOCK_M, COLUMNS // 32] is not set."""
    BLOCK_M: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    spread = tl.reshape(tl.broadcast_to(words[:, :, None], (BLOCK_M, COLUMNS // 32, 32)), (BLOCK_M, COLUMNS))
    quad = (tl.arange(0, COLUMNS) % 32 // 4).to(tl.uint32)[None, :]
    byte = (tl.arange(0, COLUMNS) % 4).to(tl.uint32)[None, :]
    if PTX and tile.dtype.primitive_bitwidth == 16:
        # One shift puts the bits of four columns on the signs of four bytes, and PRMT repeats two of these signs over a pair of
        # columns. Each element brings its own word and byte, so that any layout is right; within a thread four columns share.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 which, mask;
            shl.b32 which, $5, 8;
            or.b32 which, which, $4;
            or.b32 which, which, 0x4400;
            prmt.b32 mask, $2, $3, which;
            and.b32 $0, $1, mask;
            }""",
            "=r,r,r,r,r,r",
            [tile, spread << (7 - quad), 0x88 + 0x11 * byte],
            dtype=tile.dtype,
            is_pure=True,
            pack=2,
        )
    return tl.where((spread >> (quad + 8 * byte) & 1) != 0, tile, tl.zeros_like(tile))
