"""The forward kernels, in two forms that the tile table chooses between.

    one launch    forward_kernel(ONE_PASS): a program owns some rows of one group. It runs over K for s = D(x) Aᵀ, drawing
                  each bit of its mask once, then over some tiles of N for y = x Wᵀ + bias + scale · s Bᵀ
    two launches  shrink_kernel: s of all groups from one reading of x; forward_kernel reads s instead of computing it

No load of x feeds two products. Were the tile that x Wᵀ reads also masked for s, Triton 3.6 to 3.9 would give it a shared
buffer too few (its issue 6691): on Hopper the copy of a later tile lands in the one that an asynchronous product still reads.

Dimensions: x [M, K]  w [N, K]  bias [N]  a [g, RANK, K]  b [g · N/G, RANK]  s [M, g · R]  y [M, N]; a and b are packed: of x's
dtype, the rank padded with zeros to RANK. The grid runs over the groups in POSITIONS only; tiles of N are cut per group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, keep_words, load_key, load_row_ids


@triton.jit
def pick(values: tl.constexpr, index):
    """values[index] of a constant tuple of integers, for an index known only at run time."""
    index = tl.cast(index, tl.int32)
    chosen = index * 0
    for i in tl.static_range(len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n): down GROUP_M row tiles, then on to the next tile of columns, so that neighbours share x and w in L2."""
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first_m + inside % height, inside // height


@triton.jit
def shrink(
    x_ptr, a_ptr, seed_ptr, rows_ptr, row0, first, M, K, stride_xm, stride_xk, stride_ar, site,
    KEYS: tl.constexpr, PER: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """s_g = D_g(x) A_gᵀ, float32 [BLOCK_M, RANK], of the active groups first to first + PER - 1, a tuple; rows from row0 on."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m[:, None] < (M - row0).to(tl.int32)
    x_ptrs = x_ptr + row0 * stride_xm + (offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk)
    a_ptrs = a_ptr + first.to(tl.int64) * RANK * stride_ar + (tl.arange(0, RANK)[:, None] * stride_ar + offs_k[None, :])
    keep = 1.0
    if PLANES > 0:
        k0, k1 = load_key(seed_ptr, site)
        row_ids = load_row_ids(rows_ptr, row0 + offs_m, M)
        keep = 1.0 / (1.0 - J / (1 << PLANES))

    # sᵀ = A D(x)ᵀ: RANK rows are what mma.sync takes; s itself would be a wgmma of 64 rows by 16.
    acc = (tl.zeros((RANK, BLOCK_M), tl.float32),) * PER
    # The mask is drawn one tile ahead. Its words then reach the product through the loop, where the way they were joined does
    # not show: else Triton takes the join for a reason not to load the operand by ldmatrix.
    words = ()
    if PLANES > 0:
        for i in tl.static_range(PER):
            words += (keep_words(k0, k1, pick(KEYS, first + i), row_ids, 0, J, PLANES, BLOCK_K),)  # type: ignore[assignment]
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = (offs_k < K - k)[None, :]
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs, mask=mask_m if EVEN_K else mask_m & in_k, other=0.0)
        new, coming = (), ()
        for i in tl.static_range(PER):
            # [RANK, BLOCK_K]
            a = tl.load(a_ptrs + i * RANK * stride_ar, mask=None if EVEN_K else in_k, other=None if EVEN_K else 0.0)
            dropped = x
            if PLANES > 0:
                dropped = drop(x, words[i])
                coming += (keep_words(k0, k1, pick(KEYS, first + i), row_ids, k + BLOCK_K, J, PLANES, BLOCK_K),)  # type: ignore[assignment]
            new += (tl.dot(a, tl.trans(dropped), acc[i], input_precision=PRECISION),)  # type: ignore[assignment]
        acc, words = new, coming
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K
    s = ()
    for i in tl.static_range(PER):
        s += (tl.trans(acc[i]) * keep,)  # type: ignore[assignment]
    return s


@triton.jit(do_not_specialize=["site"])
def shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, rows_ptr,
    M, K, R, stride_xm, stride_xk, stride_ar, site,
    KEYS: tl.constexpr, PER: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """s_g = D_g(x) A_gᵀ of PER active groups g from one reading of x. KEYS: what keys each group's mask."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    first = tl.program_id(0) // tiles_m * PER
    row0 = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RANK)
    s = shrink(
        x_ptr, a_ptr, seed_ptr, rows_ptr, row0, first, M, K, stride_xm, stride_xk, stride_ar, site,
        KEYS, PER, J, PLANES, RANK, EVEN_K, PRECISION, BLOCK_M, BLOCK_K, STAGES,
    )  # fmt: skip
    for i in tl.static_range(PER):
        s_ptrs = s_ptr + offs_m[:, None] * (len(KEYS) * R) + ((first + i) * R + offs_r)[None, :]
        tl.store(s_ptrs, s[i].to(s_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["site", "span"])
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, rows_ptr,
    M, N, K, GROUP_N, R, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, scale, site, span,
    POSITIONS: tl.constexpr, KEYS: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr,
    HAS_LORA: tl.constexpr, ONE_PASS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SHRINK_K: tl.constexpr, SHRINK_STAGES: tl.constexpr,
):  # fmt: skip
    """y_g = x W_gᵀ + bias_g + scale · s_g B_gᵀ for the groups at POSITIONS of the N/GROUP_N groups.

    HAS_LORA: the groups have adapters, as numbers 0 to g - 1 in a, b and s. ONE_PASS: s is computed and written, not read.
    span: how many tiles of N a program takes. EVEN_K: K is a multiple of BLOCK_K, and of SHRINK_K where s is computed.
    """
    chunks = tl.cdiv(tl.cdiv(GROUP_N, BLOCK_N), span)
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), chunks * len(POSITIONS), GROUP_M)
    number = pid_n // chunks
    chunk = pid_n % chunks
    row0 = pid_m.to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)  # from row0 on: 32 bits are enough for what a tile spans
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    mask_m = offs_m[:, None] < M - pid_m * BLOCK_M
    tl.assume(K > 0)  # a loop that may not run costs the pipelining of every wgmma

    if HAS_LORA:
        # [BLOCK_M, R] in rows of g · R
        s_ptrs = s_ptr + row0 * (len(POSITIONS) * R) + (offs_m[:, None] * (len(POSITIONS) * R) + (number * R + offs_r)[None, :])
        mask_s = mask_m & (offs_r < R)[None, :]
        if ONE_PASS:
            (s,) = shrink(
                x_ptr, a_ptr, seed_ptr, rows_ptr, row0, number, M, K, stride_xm, stride_xk, stride_ar, site,
                KEYS, 1, J, PLANES, RANK, EVEN_K, PRECISION, BLOCK_M, SHRINK_K, SHRINK_STAGES,
            )  # fmt: skip
            # the programs of these rows have the same s; the first writes it (a scalar & a tensor fails in the interpreter)
            tl.store(s_ptrs, s.to(s_ptr.dtype.element_ty), mask=mask_s & (chunk + 0 * offs_r == 0)[None, :])

    for tile in range(chunk * span, tl.minimum((chunk + 1) * span, tl.cdiv(GROUP_N, BLOCK_N))):
        col0 = tile * BLOCK_N
        n0 = pick(POSITIONS, number).to(tl.int64) * GROUP_N + col0
        mask_n = (offs_n < GROUP_N - col0)[None, :]
        x_ptrs = x_ptr + row0 * stride_xm + (offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk)
        w_ptrs = w_ptr + n0 * stride_wn + (offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            in_k = offs_k < K - k
            # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
            x = tl.load(x_ptrs, mask=mask_m if EVEN_K else mask_m & in_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n if EVEN_K else mask_n & in_k[:, None], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
            x_ptrs += BLOCK_K * stride_xk
            w_ptrs += BLOCK_K * stride_wk
        if HAS_LORA:
            if not ONE_PASS:  # not before the loop, whose registers it would take
                s = tl.load(s_ptrs, mask=mask_s, other=0.0).to(tl.float32)
            # [RANK, BLOCK_N]
            b_ptrs = b_ptr + (number.to(tl.int64) * GROUP_N + col0) * RANK + (offs_n[None, :] * RANK + offs_r[:, None])
            b = tl.load(b_ptrs, mask=mask_n, other=0.0)
            acc = tl.dot((s * scale).to(b.dtype), b, acc, input_precision=PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n0 + offs_n[None, :], mask=mask_n, other=0.0).to(tl.float32)
        y_ptrs = y_ptr + row0 * N + n0 + (offs_m[:, None] * N + offs_n[None, :])
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)
