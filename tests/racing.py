"""Two kernels for test_races.py: one that Triton 3.6 to 3.9 compiles with a race for Hopper, and the same with it mended."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _both(x_ptr, w_ptr, a_ptr, y_ptr, s_ptr, K, AGAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x wᵀ by wgmma and sᵀ = a xᵀ by mma.sync. AGAIN: the second has a load of its own."""
    m, k, r = tl.arange(0, 128), tl.arange(0, 64), tl.arange(0, 16)
    x_ptrs = x_ptr + m[:, None] * 512 + k[None, :]
    w_ptrs = w_ptr + m[None, :] * 512 + k[:, None]
    a_ptrs = a_ptr + r[:, None] * 512 + k[None, :]
    tl.assume(K > 0)
    y, s = tl.zeros((128, 128), tl.float32), tl.zeros((16, 128), tl.float32)
    for _ in range(0, K, 64):
        x = tl.load(x_ptrs)
        y = tl.dot(x, tl.load(w_ptrs), y)
        if AGAIN:
            x = tl.load(x_ptrs, eviction_policy="evict_last")
        s = tl.dot(tl.load(a_ptrs), tl.trans(x), s)
        x_ptrs += 64
        w_ptrs += 64
        a_ptrs += 64
    tl.store(y_ptr + m[:, None] * 128 + m[None, :], y.to(tl.bfloat16))
    tl.store(s_ptr + r[:, None] * 128 + m[None, :], s.to(tl.bfloat16))


@triton.jit
def shared_by_two(x_ptr, w_ptr, a_ptr, y_ptr, s_ptr, K):  # type: ignore[no-untyped-def]
    """One load of x feeds both."""
    _both(x_ptr, w_ptr, a_ptr, y_ptr, s_ptr, K, False)


@triton.jit
def loaded_twice(x_ptr, w_ptr, a_ptr, y_ptr, s_ptr, K):  # type: ignore[no-untyped-def]
    """x is loaded twice."""
    _both(x_ptr, w_ptr, a_ptr, y_ptr, s_ptr, K, True)
