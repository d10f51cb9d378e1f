"""A kernel that sums squares without a product of the tensor cores; in a file, since Triton reads a kernel's source."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def no_product(x_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x[0] = Σ x[0]², x [BLOCK, BLOCK]."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs[:, None] * BLOCK + offs[None, :])
    tl.store(x_ptr + offs, tl.sum(x * x, 1))
