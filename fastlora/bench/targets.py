"""What the library set out to reach, beside what the rows say: each met, missed or not measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from .rows import FLOOR, MODEL, OURS, PAPER, PREFIX, Row, median, over, pick, shares
from .table import NONE, Table

__all__ = ["Target", "targets"]


@dataclasses.dataclass(frozen=True)
class Target:
    """what is measured, its value from rows (one a run), and the bound: at least or at most."""

    what: str
    values: Callable[[list[Row]], list[float]]
    bound: float
    at_least: bool
    unit: str = "×"


def _vit(rows: list[Row], classes: int, kind: str = "step") -> list[Row]:
    found = pick(rows, row=kind, model=MODEL, classes=classes, batch=32)
    return [row for row in found if row["env"].get("device", "cpu") == "cpu"]


def _faster(name: str, classes: int) -> Callable[[list[Row]], list[float]]:
    return lambda rows: over(_vit(rows, classes), PAPER, name)


def _share(classes: int) -> Callable[[list[Row]], list[float]]:
    return lambda rows: shares(_vit(rows, classes), OURS)


def _memory(key: str) -> Callable[[list[Row]], list[float]]:
    def values(rows: list[Row]) -> list[float]:
        found = _vit(rows, 100, "memory")
        ours, paper = (median(pick(found, contestant=name), key) for name in (OURS, PAPER))
        return [ours / paper] if ours and paper else []

    return values


def _flops(rows: list[Row]) -> list[float]:
    found = [row for row in pick(rows, row="counted", model=MODEL, rank=16) if "flops" in row]
    ours, floor = (median(pick(found, contestant=name), "flops") for name in ("fastlora, host's encoders", FLOOR))
    return [ours / floor] if ours and floor else []


def _saved(rows: list[Row]) -> list[float]:
    return [row["saved_over_x"] for row in pick(rows, row="counted") if "saved_over_x" in row]


TARGETS = [
    *(Target(f"ViT-B-32, {n} classes: faster than the paper's arithmetic", _faster(OURS, n), b, True)
      for n, b in ((10, 1.6), (100, 4.2), (1000, 11.0))),
    *(Target(f"the same with share_prefix, {n} classes", _faster(PREFIX, n), b, True) for n, b in ((100, 4.8), (1000, 16.0))),
    *(Target(f"ViT-B-32, {n} classes: share of torch.mm's own speed", _share(n), 0.8, True, "") for n in (10, 100, 1000)),
    Target("100 classes: peak memory over the paper's arithmetic", _memory("peak_bytes"), 0.3, False, ""),
    Target("100 classes: growth over the state before a step, over the paper's", _memory("growth_bytes"), 1 / 6, False, ""),
    Target("FLOPs of a patched ViT-B-32 at rank 16 over frozen (counted)", _flops, 1.03, False, ""),
    Target("bytes saved by one packed q, k, v, in sizes of x (counted)", _saved, 1.1, False, ""),
]  # fmt: skip


def targets(rows: list[Row]) -> Table | None:
    """Each target, its value (median over whole runs, and their range) and whether it was met."""
    cells = []
    for target in TARGETS:
        values = target.values(rows)
        sign = "≥" if target.at_least else "≤"
        bound = f"{sign} {target.bound:.3g} {target.unit}".strip()
        if not values:
            cells.append((target.what, bound, NONE, "", "not measured"))
            continue
        middle = statistics.median(values)
        met = middle >= target.bound if target.at_least else middle <= target.bound
        between = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
        cells.append((target.what, bound, f"{middle:.3g} {target.unit}".strip(), between, "met" if met else "missed"))
    if all(cell[-1] == "not measured" for cell in cells):
        return None
    return Table("Targets", ("what", "target", "measured", "runs", ""), cells)
