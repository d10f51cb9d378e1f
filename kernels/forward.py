"""The forward kernels, in two forms that the tile table chooses between.

    one pass    forward_kernel(ONE_PASS): while x Wᵀ accumulates, the same tile of x, dropped, accumulates s = D(x) Aᵀ
    two passes  shrink_kernel: s of all groups, each bit of the mask drawn once; forward_kernel: x Wᵀ
    both        the epilogue adds scale · s Bᵀ and the bias

Alternatives, for measuring (tiles.Plan): the mask's bits from memory (words_ptr), x and w through tensor descriptors
(DESCRIPTORS), the two passes overlapped (OVERLAP: forward_kernel starts while shrink_kernel runs, and waits before it reads s).

Dimensions: x [M, K]  w [N, K]  bias [N]  a [g, RANK, K]  b [g · N/G, RANK]  s [M, g · R]  y [M, N]; a and b are packed: of x's
dtype, the rank padded with zeros to RANK. The grid runs over the groups in POSITIONS only; tiles of N are cut per group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from .dropout import drop, keep_words, load_key, load_row_ids, load_words


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


@triton.jit(do_not_specialize=["site"])
def shrink_kernel(
    x_ptr, a_ptr, s_ptr, seed_ptr, rows_ptr,
    M, K, R, stride_xm, stride_xk, stride_ar, site,
    KEYS: tl.constexpr, PER: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s_g = D_g(x) A_gᵀ of PER active groups g from one reading of x. KEYS: what keys each group's mask."""
    if OVERLAP:
        tl_cuda.gdc_launch_dependents()
    tiles_m = tl.cdiv(M, BLOCK_M)
    first = tl.program_id(0) // tiles_m * PER
    row0 = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    mask_m = offs_m[:, None] < M
    x_ptrs = x_ptr + row0 * stride_xm + (tl.arange(0, BLOCK_M)[:, None] * stride_xm + offs_k[None, :] * stride_xk)
    a_ptrs = a_ptr + first.to(tl.int64) * RANK * stride_ar + (offs_r[:, None] * stride_ar + offs_k[None, :])
    keep = 1.0
    if PLANES > 0:
        k0, k1 = load_key(seed_ptr, site)
        row_ids = load_row_ids(rows_ptr, offs_m, M)
        keep = 1.0 / (1.0 - J / (1 << PLANES))

    # sᵀ = A D(x)ᵀ: with RANK rows the product runs on mma.sync, which leaves forward_kernel's wgmma in flight.
    acc = (tl.zeros((RANK, BLOCK_M), tl.float32),) * PER
    for k in range(0, K, BLOCK_K):
        in_k = (offs_k < K - k)[None, :]
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs, mask=mask_m if EVEN_K else mask_m & in_k, other=0.0)
        new = ()
        for i in tl.static_range(PER):
            # [RANK, BLOCK_K]
            a = tl.load(a_ptrs + i * RANK * stride_ar, mask=None if EVEN_K else in_k, other=None if EVEN_K else 0.0)
            dropped = x
            if PLANES > 0:
                dropped = drop(x, keep_words(k0, k1, pick(KEYS, first + i), row_ids, k, J, PLANES, BLOCK_K))
            new += (tl.dot(a, tl.trans(dropped), acc[i], input_precision=PRECISION),)  # type: ignore[assignment]
        acc = new
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K
    for i in tl.static_range(PER):
        s_ptrs = s_ptr + offs_m[:, None] * (len(KEYS) * R) + ((first + i) * R + offs_r)[None, :]
        tl.store(s_ptrs, tl.trans(acc[i] * keep).to(s_ptr.dtype.element_ty), mask=mask_m & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["site"])
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, s_ptr, y_ptr, seed_ptr, rows_ptr, words_ptr,
    M, N, K, GROUP_N, R, WORDS, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, scale, site,
    POSITIONS: tl.constexpr, KEYS: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr,
    HAS_LORA: tl.constexpr, ONE_PASS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y_g = x W_gᵀ + bias_g + scale · s_g B_gᵀ for the groups at POSITIONS of the N/GROUP_N groups; see the module's text.

    HAS_LORA: the groups have adapters, as numbers 0 to g - 1 in a, b and s. ONE_PASS: s is computed and written, not read.
    DESCRIPTORS: x_ptr and w_ptr are descriptors with blocks [BLOCK_M, BLOCK_K] and [BLOCK_N, BLOCK_K].
    """
    tiles_n = tl.cdiv(GROUP_N, BLOCK_N)
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n * len(POSITIONS), GROUP_M)
    number = pid_n // tiles_n
    row0 = pid_m.to(tl.int64) * BLOCK_M
    col0 = (pid_n % tiles_n) * BLOCK_N
    n0 = pick(POSITIONS, number).to(tl.int64) * GROUP_N + col0
    offs_m = row0 + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    mask_m = offs_m[:, None] < M
    mask_n = (offs_n < GROUP_N - col0)[None, :]
    if not DESCRIPTORS:
        x_ptrs = x_ptr + row0 * stride_xm + (tl.arange(0, BLOCK_M)[:, None] * stride_xm + offs_k[None, :] * stride_xk)
        w_ptrs = w_ptr + n0 * stride_wn + (offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk)
    COMPUTE_S: tl.constexpr = HAS_LORA and ONE_PASS
    DROPOUT: tl.constexpr = COMPUTE_S and PLANES > 0
    if COMPUTE_S:
        s_acc = tl.zeros((RANK, BLOCK_M), tl.float32)
        a_ptrs = a_ptr + number.to(tl.int64) * RANK * stride_ar + (offs_r[:, None] * stride_ar + offs_k[None, :])
    if DROPOUT and words_ptr is None:
        k0, k1 = load_key(seed_ptr, site)
        row_ids = load_row_ids(rows_ptr, offs_m, M)
        key = pick(KEYS, number)

    tl.assume(K > 0)  # a loop that may not run costs the pipelining of every wgmma
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        in_k = offs_k < K - k
        # [BLOCK_M, BLOCK_K], [BLOCK_K, BLOCK_N]
        if DESCRIPTORS:
            x = x_ptr.load([row0.to(tl.int32), k])
            w = tl.trans(w_ptr.load([n0.to(tl.int32), k]))
        else:
            x = tl.load(x_ptrs, mask=mask_m if EVEN_K else mask_m & in_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_n if EVEN_K else mask_n & in_k[:, None], other=0.0)
            x_ptrs += BLOCK_K * stride_xk
            w_ptrs += BLOCK_K * stride_wk
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if COMPUTE_S:
            # [RANK, BLOCK_K]
            a = tl.load(a_ptrs, mask=None if EVEN_K else in_k[None, :], other=None if EVEN_K else 0.0)
            dropped = x
            if DROPOUT:
                if words_ptr is None:
                    words = keep_words(k0, k1, key, row_ids, k, J, PLANES, BLOCK_K)
                else:
                    words = load_words(words_ptr, number, offs_m, k, M, WORDS, BLOCK_K)
                dropped = drop(x, words)
            s_acc = tl.dot(a, tl.trans(dropped), s_acc, input_precision=PRECISION)
            a_ptrs += BLOCK_K

    if HAS_LORA:
        # [BLOCK_M, R] in rows of g · R
        s_ptrs = s_ptr + offs_m[:, None] * (len(POSITIONS) * R) + (number * R + offs_r)[None, :]
        mask_s = mask_m & (offs_r < R)[None, :]
        if COMPUTE_S:
            s_acc = tl.trans(s_acc)
            if DROPOUT:
                s_acc *= 1.0 / (1.0 - J / (1 << PLANES))
            # every tile of the group has the same s; the first writes it (a scalar & a tensor fails in the interpreter)
            tl.store(s_ptrs, s_acc.to(s_ptr.dtype.element_ty), mask=mask_s & (col0 + 0 * offs_r == 0)[None, :])
        else:
            if OVERLAP:
                tl_cuda.gdc_wait()
            s_acc = tl.load(s_ptrs, mask=mask_s, other=0.0).to(tl.float32)
        # [RANK, BLOCK_N]
        b_ptrs = b_ptr + (number.to(tl.int64) * GROUP_N + col0) * RANK + (offs_n[None, :] * RANK + offs_r[:, None])
        b = tl.load(b_ptrs, mask=mask_n, other=0.0)
        acc = tl.dot((s_acc * scale).to(b.dtype), b, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n0 + offs_n[None, :], mask=mask_n, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + offs_m[:, None] * N + (n0 + offs_n)[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_m & mask_n)
