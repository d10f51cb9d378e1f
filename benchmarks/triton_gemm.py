"""A plain Triton GEMM, out = x wᵀ, with no adapter: what Triton reaches beside cuBLAS before any LoRA is added."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure import by_graph
from run import Run
from shapes import Case, InputSet


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


Product = Callable[[Tensor, Tensor], Tensor]
CONTESTANTS: dict[str, Product] = {
    "cuBLAS": lambda x, w: torch.mm(x, w.T),
    **{f"Triton {tile}": functools.partial(gemm, tile=tile) for tile in TILES},
}


def pairs(name: str, m: int, k: int, n: int, device: str, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Operands of a product "x Wᵀ" or "dy W", bfloat16; dx = dy W reads W along its rows, as backward does."""
    sets = [InputSet.draw(Case("gemm", m, k, n, dtype=torch.bfloat16, device=device), i) for i in range(1, count + 1)]
    return [(s.x, s.layers[0].weight if name == "x Wᵀ" else s.layers[0].weight.T.contiguous().T) for s in sets]


def measure_products(run: Run, sample: float) -> None:
    """Triton's plain GEMM beside cuBLAS on the forward's and the backward's base product, every tile of its list."""
    print("\nplain GEMM, bf16: cuBLAS TFLOP/s, Triton's best, their ratio")
    for d in (768, 1024):
        for m in (50432, 6304, 1600):
            for name, k, n in (("x Wᵀ", d, 3 * d), ("dy W", 3 * d, d)):
                mine = [label for label in CONTESTANTS if (name, str(m), str(k), label) not in run.done]
                # what follows is what this script is for
                if not mine or run.over(240):
                    continue
                speed = _speeds(run, mine, name, (m, k, n), sample)
                best = max((v for label, v in speed.items() if label != "cuBLAS"), default=float("nan"))
                cublas = speed.get("cuBLAS", float("nan"))
                print(
                    f"  {name}  {m:6d}x{k}->{n:5d}  {cublas / 1e12:6.0f}  {best / 1e12:6.0f}  {best / cublas:.2f}", flush=True
                )


def _speeds(run: Run, mine: list[str], name: str, sizes: tuple[int, int, int], sample: float) -> dict[str, float]:
    """FLOP/s of each contestant whose result is right."""
    m, k, n = sizes
    operands = pairs(name, m, k, n, run.device.type)
    truth = operands[0][0].double() @ operands[0][1].double().T
    speed: dict[str, float] = {}
    for label in mine:
        row = {"row": "gemm", "product": name, "m": m, "k": k, "n": n, "contestant": label}
        product = CONTESTANTS[label]
        try:
            error = float((product(*operands[0]).double() - truth).abs().max() / truth.abs().max())
            row["error"] = error
            if not error <= 4 * torch.finfo(torch.bfloat16).eps:
                run.rows.add(row | {"refused": "wrong result"})
                continue
            timing = by_graph([functools.partial(product, x, w) for x, w in operands], torch.cuda.Stream(), sample)
        except Exception as failure:  # a tile that the card does not take is a result
            run.failed(row, failure)
            if run.broken:
                break
            continue
        speed[label] = 2 * m * k * n / timing.median
        run.rows.add(row | timing.row() | {"tflops": speed[label] / 1e12})
    return speed
