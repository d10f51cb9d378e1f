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
    RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [g, R, columns] = factor · Σ_slot partial [slots, g, RANK, columns], in the order of the slots."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, r, g = offs % COLUMNS, offs // COLUMNS % R, offs // COLUMNS // R
    mask = g < G
    ptrs = partial_ptr + (g * RANK + r) * COLUMNS + c
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(slots):
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += tl.cast(G, tl.int64) * RANK * COLUMNS
    out_ptrs = out_ptr + g * stride_g + r * stride_r + c * stride_c
    tl.store(out_ptrs, (total * factor).to(out_ptr.dtype.element_ty), mask=mask)
