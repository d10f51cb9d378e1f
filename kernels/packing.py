"""What happens to the adapters around the products: packed to the compute dtype before, partial gradients summed after."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_kernel(
    a_ptr, b_ptr, a_packed_ptr, b_packed_ptr,
    G, R, K, K_PADDED, B_ROWS, a_programs, stride_ag, stride_ar, stride_ak, stride_bn, stride_br,
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a [g, R, K] -> [g, RANK, K_PADDED] and b [g · N/G, R] -> [g · N/G, RANK], filled with zeros, one launch for both."""
    pid = tl.program_id(0)
    if pid < a_programs:
        offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        k, r, g = offs % K_PADDED, offs // K_PADDED % RANK, offs // K_PADDED // RANK
        value = tl.load(a_ptr + g * stride_ag + r * stride_ar + k * stride_ak, mask=(g < G) & (r < R) & (k < K), other=0.0)
        tl.store(a_packed_ptr + offs, value.to(a_packed_ptr.dtype.element_ty), mask=g < G)
    else:
        offs = (pid - a_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        r, n = offs % RANK, offs // RANK
        value = tl.load(b_ptr + n * stride_bn + r * stride_br, mask=(n < B_ROWS) & (r < R), other=0.0)
        tl.store(b_packed_ptr + offs, value.to(b_packed_ptr.dtype.element_ty), mask=n < B_ROWS)


@triton.jit
def reduce_kernel(
    partial_ptr, out_ptr,
    slots, G, R, COLUMNS, stride_g, stride_r, stride_c, factor,
    RANK: tl.constexpr, ABREAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [g, R, columns] = factor · Σ_slot partial [slots, g, RANK, columns], in a fixed order.

    ABREAST: how many slots are read at once; a loop over single ones would wait for memory in each turn.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, r, g = offs % COLUMNS, offs // COLUMNS % R, offs // COLUMNS // R
    mask = g < G
    slot = tl.arange(0, ABREAST).to(tl.int64)[:, None]
    size = tl.cast(G, tl.int64) * RANK * COLUMNS
    # [ABREAST, BLOCK]
    ptrs = partial_ptr + slot * size + ((g * RANK + r) * COLUMNS + c)[None, :]
    sums = tl.zeros((ABREAST, BLOCK), tl.float32)
    for first in range(0, slots, ABREAST):
        sums += tl.load(ptrs, mask=(slot < slots - first) & mask[None, :], other=0.0)
        ptrs += ABREAST * size
    total = tl.sum(sums, 0) * factor
    out_ptrs = out_ptr + g * stride_g + r * stride_r + c * stride_c
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
