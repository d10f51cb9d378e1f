"""The backward kernels, in two forms that the tile table chooses between.

    ds_g = scale · dy_g B_g;   dB_g = scale · dy_gᵀ s_g;   dA_g = ds_gᵀ D_g(x);   dx = dy W + Σ_g D_gᵀ(ds_g A_g)

    one pass    backward_kernel(ONE_PASS): dx's product runs over N, so each tile of dy it reads feeds ds too, and dB
    two passes  ds_db_kernel: ds and dB from one reading of dy; backward_kernel: dy W
    both        an epilogue adds Σ_g D_gᵀ(ds_g A_g), and dA from the same tile of x where the plan says so; else da_kernel

Programs persist over row tiles and add into partial sums of their own (`slot`), which `reduce_kernel` sums in a fixed order:
the same bits on each run, without atomics. In memory and in registers ds waits in x's dtype with scale / (1 - drop rate) in
it, which both of its uses need. Dimensions as in forward.py; partial sums: da [slots, g, RANK, K], db [slots, g, RANK, N/G].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .dropout import drop, keep_words, load_key, load_row_ids
from .forward import pick


@triton.jit
def add_to_slot(ptrs, value, mask, first):
    """*ptrs += value, or = value the first time: a slot belongs to one program and is never cleared.

    The thread that reads need not be the one that wrote: a slot is visited once a row tile, so that barriers lie between.
    """
    again = mask & (first + tl.zeros(mask.shape, tl.int32) == 0)
    tl.store(ptrs, tl.load(ptrs, mask=again, other=0.0) + value, mask=mask)


@triton.jit
def columns(
    acc, ds, s_t, dy_ptrs, w_ptrs, b_ptrs, db_ptrs, mask_m, mask_k, first, WIDTH, stride_dyn, stride_wn,
    WITH_DS: tl.constexpr, WITH_DB: tl.constexpr, RANK: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc += dy W, ds += dy B and db += s dy over WIDTH columns of N; s_t is sᵀ [RANK, BLOCK_M], db is [RANK, WIDTH]."""
    offs_n = tl.arange(0, BLOCK_N)
    # at least one round: a loop that may not run makes ptxas serialise every wgmma
    for tile in range(0, tl.maximum(tl.cdiv(WIDTH, BLOCK_N), 1)):
        in_n = offs_n < WIDTH - tile * BLOCK_N
        # [BLOCK_M, BLOCK_N], [BLOCK_N, BLOCK_K]
        dy = tl.load(dy_ptrs, mask=mask_m if EVEN_N else mask_m & in_n[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_k if EVEN_N else mask_k & in_n[:, None], other=0.0)
        acc = tl.dot(dy, w, acc, input_precision=PRECISION)
        if WITH_DS:
            # [BLOCK_N, RANK]
            b = tl.load(b_ptrs, mask=None if EVEN_N else in_n[:, None], other=None if EVEN_N else 0.0)
            ds = tl.dot(dy, b, ds, input_precision=PRECISION)
            b_ptrs += BLOCK_N * RANK
        if WITH_DB:
            # A load of its own, which another eviction policy keeps apart: were dy's buffer also read by a product that is not
            # asynchronous, Triton 3.6 to 3.9 would give it one buffer too few (its issue 6691).
            mask_dy = mask_m if EVEN_N else mask_m & in_n[None, :]
            dy = tl.load(dy_ptrs, mask=mask_dy, other=0.0, eviction_policy="evict_last")
            db = tl.dot(s_t, dy, input_precision=PRECISION)
            add_to_slot(db_ptrs, db, in_n[None, :], first)
            db_ptrs += BLOCK_N
        dy_ptrs += BLOCK_N * stride_dyn
        w_ptrs += BLOCK_N * stride_wn
    return acc, ds


@triton.jit(do_not_specialize=["site"])
def backward_kernel(
    dy_ptr, x_ptr, s_ptr, w_ptr, a_ptr, b_ptr, ds_ptr, dx_ptr, da_ptr, db_ptr, seed_ptr, rows_ptr,
    M, N, K, GROUP_N, R, slots, stride_dym, stride_dyn, stride_xm, stride_xk, stride_wn, stride_wk, stride_ar, scale, site,
    POSITIONS: tl.constexpr, PLAIN: tl.constexpr, KEYS: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr,
    RANK: tl.constexpr, ONE_PASS: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx, and where they are asked for ds, dA and dB (ds_ptr, da_ptr, db_ptr not None), tile by tile of rows.

    POSITIONS: the groups with an adapter; PLAIN: those without. ONE_PASS: ds is computed, else it is read from ds_ptr.
    """
    G: tl.constexpr = len(POSITIONS)
    WITH_DB: tl.constexpr = db_ptr is not None
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_k = tl.program_id(0) % tiles_k
    slot = tl.program_id(0) // tiles_k
    k0 = pid_k.to(tl.int64) * BLOCK_K
    in_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    in_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    offs_k = k0 + in_k
    mask_k = offs_k[None, :] < K
    keep = 1.0
    if PLANES > 0:
        key0, key1 = load_key(seed_ptr, site)
        keep = 1.0 / (1.0 - J / (1 << PLANES))

    for tile_m in range(slot, tl.cdiv(M, BLOCK_M), slots):
        first = tl.cast(tile_m == slot, tl.int32)
        row0 = tl.cast(tile_m, tl.int64) * BLOCK_M
        offs_m = row0 + in_m
        mask_m = offs_m[:, None] < M
        dy_ptrs = dy_ptr + row0 * stride_dym + (in_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn)
        w_ptrs = w_ptr + k0 * stride_wk + (offs_n[:, None] * stride_wn + in_k[None, :] * stride_wk)
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        ds = tl.zeros((BLOCK_M, RANK), tl.float32)
        if ONE_PASS:
            for i in tl.static_range(len(PLAIN)):
                n0 = tl.cast(GROUP_N, tl.int64) * PLAIN[i]
                acc, ds = columns(
                    acc, ds, ds, dy_ptrs + n0 * stride_dyn, w_ptrs + n0 * stride_wn, b_ptr, b_ptr, mask_m, mask_k, 0,
                    GROUP_N, stride_dyn, stride_wn, False, False, RANK, EVEN_N, PRECISION, BLOCK_N,
                )  # fmt: skip
        else:
            acc, ds = columns(
                acc, ds, ds, dy_ptrs, w_ptrs, b_ptr, b_ptr, mask_m, mask_k, 0,
                N, stride_dyn, stride_wn, False, False, RANK, EVEN_N, PRECISION, BLOCK_N,
            )  # fmt: skip
        if PLANES > 0:
            row_ids = load_row_ids(rows_ptr, offs_m, M)

        # The programs of a row of tiles take turns with dB: a whole row tile each, not a branch in the loop over N.
        takes_turn = (tile_m // slots) % tiles_k == pid_k
        for number in range(G):
            # [BLOCK_M, RANK] in rows of g · RANK
            ds_offs = offs_m[:, None] * (G * RANK) + (number * RANK + offs_r)[None, :]
            if ONE_PASS:
                n0 = pick(POSITIONS, number).to(tl.int64) * GROUP_N
                dy_g = dy_ptrs + n0 * stride_dyn
                w_g = w_ptrs + n0 * stride_wn
                b_g = b_ptr + tl.cast(number, tl.int64) * GROUP_N * RANK + (offs_n[:, None] * RANK + offs_r[None, :])
                ds = tl.zeros((BLOCK_M, RANK), tl.float32)
                if WITH_DB and takes_turn:
                    s_ptrs = s_ptr + offs_m[:, None] * (G * R) + (number * R + offs_r)[None, :]
                    # [RANK, BLOCK_M]
                    s_t = tl.trans(tl.load(s_ptrs, mask=mask_m & (offs_r < R)[None, :], other=0.0))
                    db_g = db_ptr + ((pid_k * slots + slot).to(tl.int64) * G + number) * RANK * GROUP_N
                    db_g += offs_r[:, None] * GROUP_N + offs_n[None, :]
                    acc, ds = columns(
                        acc, ds, s_t, dy_g, w_g, b_g, db_g, mask_m, mask_k, tl.cast(tile_m < slots * tiles_k, tl.int32),
                        GROUP_N, stride_dyn, stride_wn, True, True, RANK, EVEN_N, PRECISION, BLOCK_N,
                    )  # fmt: skip
                    # keeps LLVM from merging the ends of the two loops, after which ptxas would serialise every wgmma
                    tl.debug_barrier()
                else:
                    acc, ds = columns(
                        acc, ds, ds, dy_g, w_g, b_g, b_g, mask_m, mask_k, 0,
                        GROUP_N, stride_dyn, stride_wn, True, False, RANK, EVEN_N, PRECISION, BLOCK_N,
                    )  # fmt: skip
                ds_half = (ds * (scale * keep)).to(w_ptr.dtype.element_ty)
                if ds_ptr is not None:
                    # every tile of K has the same ds; the first writes it
                    tl.store(ds_ptr + ds_offs, ds_half, mask=mask_m & (pid_k + 0 * offs_r == 0)[None, :])
            else:
                ds_half = tl.load(ds_ptr + ds_offs, mask=mask_m, other=0.0)
            # [RANK, BLOCK_K]
            a_ptrs = a_ptr + tl.cast(number, tl.int64) * RANK * stride_ar + k0 + (offs_r[:, None] * stride_ar + in_k[None, :])
            a = tl.load(a_ptrs, mask=mask_k, other=0.0)
            if PLANES > 0:
                words = keep_words(key0, key1, pick(KEYS, number), row_ids, k0, J, PLANES, BLOCK_K)
                acc += drop(tl.dot(ds_half, a, input_precision=PRECISION), words)
            else:
                acc = tl.dot(ds_half, a, acc, input_precision=PRECISION)
            if da_ptr is not None:
                x_ptrs = x_ptr + row0 * stride_xm + k0 * stride_xk + (in_m[:, None] * stride_xm + in_k[None, :] * stride_xk)
                # [BLOCK_M, BLOCK_K]
                x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
                if PLANES > 0:
                    x = drop(x, words)
                if not ONE_PASS:  # a load of its own, as in columns
                    ds_half = tl.load(ds_ptr + ds_offs, mask=mask_m, other=0.0, eviction_policy="evict_last")
                da = tl.dot(tl.trans(ds_half), x, input_precision=PRECISION)
                da_ptrs = da_ptr + ((slot.to(tl.int64) * G + number) * RANK + offs_r)[:, None] * K + offs_k[None, :]
                add_to_slot(da_ptrs, da, mask_k, first)

        dx_ptrs = dx_ptr + offs_m[:, None] * K + offs_k[None, :]
        tl.store(dx_ptrs, acc.to(dx_ptr.dtype.element_ty), mask=mask_m & mask_k)


@triton.jit
def ds_db_kernel(
    dy_ptr, s_ptr, b_ptr, ds_ptr, db_ptr,
    M, GROUP_N, R, slots, stride_dym, stride_dyn, factor,
    POSITIONS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ds = factor · dy B (ds_ptr not None) and the partial sums of dB (db_ptr not None) from one reading of dy."""
    G: tl.constexpr = len(POSITIONS)
    slot = tl.program_id(0) // G
    number = tl.program_id(0) % G
    in_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, RANK)
    b_ptrs = b_ptr + number.to(tl.int64) * GROUP_N * RANK + (offs_n[None, :] * RANK + offs_r[:, None])
    if db_ptr is not None:
        db_ptrs = db_ptr + (slot.to(tl.int64) * G + number) * GROUP_N * RANK
        db_ptrs += offs_r[:, None] * GROUP_N + offs_n[None, :]
    n0 = pick(POSITIONS, number).to(tl.int64) * GROUP_N
    for tile_m in range(slot, tl.cdiv(M, BLOCK_M), slots):
        row0 = tl.cast(tile_m, tl.int64) * BLOCK_M
        offs_m = row0 + in_m
        mask_m = offs_m[:, None] < M
        dy_ptrs = dy_ptr + row0 * stride_dym + n0 * stride_dyn
        dy_ptrs += in_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn
        if db_ptr is not None:
            s_ptrs = s_ptr + offs_m[:, None] * (G * R) + (number * R + offs_r)[None, :]
            # [BLOCK_M, RANK]
            s_t = tl.trans(tl.load(s_ptrs, mask=mask_m & (offs_r < R)[None, :], other=0.0))
        # dsᵀ = Bᵀ dyᵀ: with RANK rows both products of a tile of dy run on mma.sync, and none reads it asynchronously
        ds_t = tl.zeros((RANK, BLOCK_M), tl.float32)
        for col0 in range(0, GROUP_N, BLOCK_N):
            in_n = offs_n < GROUP_N - col0
            # [BLOCK_M, BLOCK_N]
            dy = tl.load(dy_ptrs, mask=mask_m & in_n[None, :], other=0.0)
            if ds_ptr is not None:
                # [RANK, BLOCK_N]
                b_t = tl.load(b_ptrs + col0 * RANK, mask=in_n[None, :], other=0.0)
                ds_t = tl.dot(b_t, tl.trans(dy), ds_t, input_precision=PRECISION)
            if db_ptr is not None:
                db = tl.dot(s_t, dy, input_precision=PRECISION)
                add_to_slot(db_ptrs + col0, db, in_n[None, :], tl.cast(tile_m == slot, tl.int32))
            dy_ptrs += BLOCK_N * stride_dyn
        if ds_ptr is not None:
            ds_ptrs = ds_ptr + offs_m[:, None] * (G * RANK) + (number * RANK + offs_r)[None, :]
            tl.store(ds_ptrs, tl.trans(ds_t * factor).to(ds_ptr.dtype.element_ty), mask=mask_m)


@triton.jit(do_not_specialize=["site"])
def da_kernel(
    x_ptr, ds_ptr, da_ptr, seed_ptr, rows_ptr,
    M, K, slots, stride_xm, stride_xk, site,
    KEYS: tl.constexpr, PER: tl.constexpr, J: tl.constexpr, PLANES: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The partial sums of dA_g = ds_gᵀ D_g(x) of PER active groups g from one reading of x."""
    G: tl.constexpr = len(KEYS)
    tiles_k = tl.cdiv(K, BLOCK_K)
    k0 = (tl.program_id(0) % tiles_k).to(tl.int64) * BLOCK_K
    slot = tl.program_id(0) // tiles_k % slots
    first = tl.program_id(0) // tiles_k // slots * PER
    in_m = tl.arange(0, BLOCK_M)
    in_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RANK)
    offs_k = k0 + in_k
    mask_k = offs_k[None, :] < K
    if PLANES > 0:
        key0, key1 = load_key(seed_ptr, site)
    acc = (tl.zeros((RANK, BLOCK_K), tl.float32),) * PER
    words = ()
    if PLANES > 0:
        row_ids = load_row_ids(rows_ptr, slot.to(tl.int64) * BLOCK_M + in_m, M)
        for i in tl.static_range(PER):
            words += (keep_words(key0, key1, pick(KEYS, first + i), row_ids, k0, J, PLANES, BLOCK_K),)  # type: ignore[assignment]
    for tile_m in range(slot, tl.cdiv(M, BLOCK_M), slots):
        row0 = tl.cast(tile_m, tl.int64) * BLOCK_M
        offs_m = row0 + in_m
        mask_m = offs_m[:, None] < M
        x_ptrs = x_ptr + row0 * stride_xm + k0 * stride_xk + (in_m[:, None] * stride_xm + in_k[None, :] * stride_xk)
        # [BLOCK_M, BLOCK_K]
        x = tl.load(x_ptrs, mask=mask_m & mask_k, other=0.0)
        if PLANES > 0:
            row_ids = load_row_ids(rows_ptr, offs_m + tl.cast(slots, tl.int64) * BLOCK_M, M)
        new, coming = (), ()
        for i in tl.static_range(PER):
            # [BLOCK_M, RANK]
            ds_ptrs = ds_ptr + offs_m[:, None] * (G * RANK) + ((first + i) * RANK + offs_r)[None, :]
            ds = tl.load(ds_ptrs, mask=mask_m, other=0.0)
            dropped = x
            if PLANES > 0:
                # one tile ahead, as in forward.shrink
                coming += (keep_words(key0, key1, pick(KEYS, first + i), row_ids, k0, J, PLANES, BLOCK_K),)  # type: ignore[assignment]
                dropped = drop(x, words[i])
            new += (tl.dot(tl.trans(ds), dropped, acc[i], input_precision=PRECISION),)  # type: ignore[assignment]
        acc, words = new, coming
    for i in tl.static_range(PER):
        da_ptrs = da_ptr + ((slot.to(tl.int64) * G + first + i) * RANK + offs_r)[:, None] * K + offs_k[None, :]
        tl.store(da_ptrs, acc[i], mask=mask_k)
