"""Part e: a plain Triton GEMM with no adapter beside cuBLAS, on the layer's two base products: x Wᵀ and dy W."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora.kernels.launch import Launch, launch, recording
from fastlora.kernels.tiles import Tile
from measure import by_clock, by_graph
from shapes import Case, InputSet

from .items import Item, Needed, Row
from .run import Run

__all__ = ["CONTESTANTS", "items"]

SAMPLE = 0.06
# Large to small: the large ones fill the tensor cores at M = 50432, the small ones fill the card at M = 1600.
TILES = (
    Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(64, 256, 64, 8, 4),
    Tile(64, 128, 64, 4, 4),
)  # fmt: skip
SETUP = 0.25  # seconds of one contestant beside its sample: operands, an fp64 product, the capture of a graph
CALLS = 120


@triton.jit
def gemm_kernel(
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
    (stride_xm, stride_xk), (stride_wn, stride_wk) = x.stride(), w.stride()
    launch(
        gemm_kernel, triton.cdiv(len(x), tile.m) * triton.cdiv(len(w), tile.n), tile,
        x_ptr=x, w_ptr=w, out_ptr=out, M=len(x), N=len(w), K=x.shape[1], stride_xm=stride_xm, stride_xk=stride_xk,
        stride_wn=stride_wn, stride_wk=stride_wk, stride_om=out.stride(0),
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=8,
    )  # fmt: skip
    return out


Product = Callable[[Tensor, Tensor], Tensor]
CONTESTANTS: dict[str, Product] = {
    "cuBLAS": lambda x, w: torch.mm(x, w.T),
    **{f"Triton {tile}": functools.partial(gemm, tile=tile) for tile in TILES},
}


def _operands(product: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of "x Wᵀ" or "dy W": dx = dy W reads W along its rows, as backward does."""
    return x, weight if product == "x Wᵀ" else weight.T.contiguous().T


def record(product: str, m: int, k: int, n: int, tile: Tile) -> list[Launch]:
    """The launch of one product on "meta" tensors."""
    x, w = (torch.empty(*size, dtype=torch.bfloat16, device="meta") for size in ((m, k), (n, k)))
    with recording() as launches:
        gemm(*_operands(product, x, w), tile)
    return launches


def _pairs(product: str, m: int, k: int, n: int, device: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    sets = [InputSet.draw(Case("gemm", m, k, n, dtype=dtype, device=device), i) for i in range(1, 9)]
    return [_operands(product, s.x, s.layers[0].weight) for s in sets]


def items(device: str, smoke: bool) -> list[Item]:
    """An item for each product, size and contestant."""
    shapes = [(20, 32)] if smoke else [(m, d) for d in (768, 1024) for m in (50432, 6304)]
    found = []
    for m, d in shapes:
        for product, k, n in (("x Wᵀ", d, 3 * d), ("dy W", 3 * d, d)):
            for label in CONTESTANTS:
                tile = CONTESTANTS[label].keywords["tile"] if label != "cuBLAS" else None  # type: ignore[attr-defined]
                found.append(
                    Item(
                        "e",
                        f"{product} {m}x{k}->{n}, {label}",
                        SETUP + SAMPLE,
                        functools.partial(measure, product, (m, k, n), label),
                        needs=(Needed(record, (product, m, k, n, tile)),) if tile else (),
                        calls=CALLS if tile else 0,
                        strict=True,
                        about={"product": product, "m": m, "k": k, "n": n, "contestant": label},
                    )
                )
    return found


def measure(product: str, sizes: tuple[int, int, int], label: str, run: Run) -> Iterator[Row]:
    """The time of one contestant whose result is right."""
    m, k, n = sizes
    dtype = torch.float32 if run.device.type == "cpu" else torch.bfloat16
    shape = product, m, k, n, run.device.type, dtype
    operands = run.keep(shape, functools.partial(_pairs, *shape))
    multiply = CONTESTANTS[label]
    x, w = operands[0]
    truth = x.double() @ w.double().T
    error = float((multiply(x, w).double() - truth).abs().max() / truth.abs().max())
    row: Row = {"row": "gemm", "error": error}
    if not error <= 4 * torch.finfo(dtype).eps:
        yield row | {"refused": [f"wrong result: an error of {error:.2e} of the largest value"]}
        return
    calls = [functools.partial(multiply, x, w) for x, w in operands]
    if run.device.type == "cuda":
        timing = by_graph(calls, torch.cuda.Stream(), SAMPLE)
    else:
        timing = by_clock(calls, run.device, 0.0, least=1)
    yield row | timing.row() | {"tflops": 2 * m * k * n / timing.median / 1e12}
