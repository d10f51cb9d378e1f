"""What was measured on an H100: the committed rows, by what was predicted for them."""

from __future__ import annotations

from functools import cache

import torch

from fastlora.bench.rows import Row, median, pick, read
from rows import ON_GPUS
from shapes import Case


@cache
def gpu_rows() -> list[Row]:
    """The committed rows of an H100, none until it was measured."""
    if not ON_GPUS.is_dir() or not any(ON_GPUS.rglob("*.jsonl")):
        return []
    return [row for row in read(ON_GPUS) if "H100" in str(row["env"].get("gpu"))]


def case_of(m: int, k: int, rank: int = 16, dropout: float = 0.25) -> Case:
    """Packed q, k, v as benchmarks/device.py measures them."""
    return Case("qkv", m, k, 3 * k, 3, rank, dropout, torch.bfloat16, "cuda")


class Rows:
    """What was measured, in microseconds and bytes; None where it was not."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [row for row in rows if "median_ms" in row]

    def _us(self, **wanted: object) -> float | None:
        found = median(pick(self.rows, **wanted), "median_ms")
        return None if found is None else 1e3 * found

    def layer(self, case: Case, contestant: str) -> float | None:
        return self._us(row="op", case=case.name, contestant=contestant, phase="both", method="graph")

    def product(self, name: str, m: int, k: int, n: int, contestant: str) -> float | None:
        """By Triton the best tile's."""
        found = [r for r in pick(self.rows, row="gemm", product=name, m=m, k=k, n=n) if r["contestant"].startswith(contestant)]
        times = [self._us(row="gemm", product=name, m=m, k=k, n=n, contestant=r["contestant"]) for r in found]
        return min((time for time in times if time is not None), default=None)

    def change(self, case: Case, phase: str, what: str) -> float | None:
        return self._us(row="tune", case=case.name, phase=phase, change=what)

    def _step(self, classes: int, contestant: str, engine: str) -> list[Row]:
        found = pick(self.rows, row="step", classes=classes, contestant=contestant, engine=engine)
        return [row for row in found if str(row["case"]).startswith("ViT-B-16")]

    def step(self, classes: int, contestant: str, engine: str) -> float | None:
        found = median(self._step(classes, contestant, engine), "median_ms")
        return None if found is None else 1e3 * found

    def peak(self, classes: int, contestant: str) -> float | None:
        """Bytes above those of the model before its first step."""
        return median(self._step(classes, contestant, "as written"), lambda row: row["peak_bytes"] - row["held_bytes"])
