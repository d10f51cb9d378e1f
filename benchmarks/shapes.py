"""What one adapted layer is measured on: its shape, the work it must do at least, and random inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: x (m, k) through a weight (n, k) of `groups` packed projections; "mlp" is k -> n -> k with GELU between."""

    kind: str
    m: int
    k: int
    n: int
    groups: int = 1
    rank: int = 16
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def name(self) -> str:
        kind = f"{self.kind} {self.m}x{self.k}->{self.n}"
        return f"{kind} r={self.rank} p={self.dropout:g} {str(self.dtype).removeprefix('torch.')}"

    def row(self) -> dict[str, Any]:
        """What a results file keeps of it."""
        return {"case": self.name, **dataclasses.asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.rank)

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(K, N) of each linear layer."""
        return [(self.k, self.n), (self.n, self.k)] if self.kind == "mlp" else [(self.k, self.n)]

    def work(self, phase: str) -> tuple[float, float]:
        """FLOPs and bytes of an ideal "forward", "backward" or "both": each product once, each tensor moved once."""
        if phase == "both":
            return tuple(map(sum, zip(self.work("forward"), self.work("backward"), strict=True)))  # type: ignore[return-value]
        flops = nbytes = 0.0
        m, size = self.m, self.dtype.itemsize
        for k, n in self.layers:
            shrink, expand = 2 * m * self.groups * self.rank * k, 2 * m * self.rank * n
            # s and its product with B; backward: ds and dB, then dA and ds A
            flops += 2 * m * k * n + (shrink + expand) * (1 if phase == "forward" else 2)
            nbytes += size * (m * k + m * n + k * n)
            if phase == "backward":
                nbytes += size * (m * k + m * self.groups * self.rank)
        return flops, nbytes


@dataclasses.dataclass(frozen=True)
class Layer:
    """weight (N, K) and bias (N,) frozen, of the case's dtype; a (G, R, K) and b (N, R) fp32 masters, b stacked by group."""

    weight: Tensor
    bias: Tensor
    a: Tensor
    b: Tensor


@dataclasses.dataclass(frozen=True)
class InputSet:
    """Inputs of one call; x and dy (M, K or N) of the case's dtype. seed keys our dropout mask."""

    case: Case
    x: Tensor
    dy: Tensor
    layers: tuple[Layer, ...]
    seed: Tensor

    @classmethod
    def draw(cls, case: Case, number: int) -> InputSet:
        """Fresh random inputs of sizes that a CLIP block sees: rows of x about unit, weights about 1 / sqrt(K)."""
        generator = torch.Generator(case.device).manual_seed(1000 + number)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=case.device) * scale).to(dtype)

        layers = tuple(
            Layer(
                normal(n, k, scale=k**-0.5),
                normal(n, scale=0.1),
                normal(case.groups, case.rank, k, scale=k**-0.5, dtype=torch.float32),
                normal(n, case.rank, scale=0.3, dtype=torch.float32),
            )
            for k, n in case.layers
        )
        out = case.layers[-1][1]
        seed = torch.full((), 17 + number, dtype=torch.int64, device=case.device)
        return cls(case, normal(case.m, case.k), normal(case.m, out), layers, seed)

    def nbytes(self) -> int:
        """What one set occupies."""
        return sum(t.nbytes for t in [self.x, self.dy, *(v for layer in self.layers for v in vars(layer).values())])
