"""A plain Triton GEMM, out = x wᵀ, with no adapter: what Triton reaches beside cuBLAS before any LoRA is added."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Tile:
    """BLOCK_M x BLOCK_N of the output, BLOCK_K a step; warps and pipeline stages of one program."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# Large to small: the large ones fill the tensor cores at M = 50432, the small ones fill the card at M = 1600.
TILES = (
    Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(64, 256, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
)  # fmt: skip


@triton.jit
def _gemm(
    x_ptr, w_ptr, out_ptr, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # programs that share rows of x and w run together, so that both stay in the L2
    pid = tl.program_id(0).to(tl.int64)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP * tiles_n) * GROUP
    rows = min(tiles_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * tiles_n) % rows
    pid_n = pid % (GROUP * tiles_n) // rows
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_at = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        # [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N]
        x = tl.load(x_at, mask=(offs_m[:, None] < M) & (offs_k[None, :] < K - k), other=0.0)
        w = tl.load(w_at, mask=(offs_n[None, :] < N) & (offs_k[:, None] < K - k), other=0.0)
        acc = tl.dot(x, w, acc)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K * stride_wk
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :], out, mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


def gemm(x: Tensor, w: Tensor, tile: Tile) -> Tensor:
    """x (M, K), w (N, K), any strides -> x wᵀ (M, N), contiguous, of x's dtype."""
    out = torch.empty(len(x), len(w), device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(len(x), tile.m) * triton.cdiv(len(w), tile.n),)
    _gemm[grid](
        x, w, out, len(x), len(w), x.shape[1], *x.stride(), *w.stride(), out.stride(0),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
