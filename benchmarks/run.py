"""One run of device.py: where it runs, where rows go, what earlier runs have measured, and when it must end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from machine import Ceilings, Rows, read_rows


@dataclasses.dataclass
class Run:
    """One run.

    Args:
        deadline: time.monotonic() at which it must be over.
        smoke: tiny sizes, and no budget.
        done: what earlier runs have measured: see `finished`.
        broken: a kernel has poisoned the CUDA context: nothing after it can be believed.
    """

    device: torch.device
    rows: Rows
    ceilings: Ceilings
    deadline: float
    smoke: bool
    done: frozenset[tuple[str, ...]] = frozenset()
    broken: bool = False

    def left(self) -> float:
        """Seconds until the budget ends."""
        return self.deadline - time.monotonic()

    def over(self, needs: float) -> bool:
        """Whether something that takes so many seconds must not be begun; never in a smoke run."""
        return self.broken or (self.left() < needs and not self.smoke)

    def failed(self, row: dict[str, Any], error: Exception) -> None:
        """Keep what one contestant's failure said; the others' numbers must not be lost. Notice a context that is lost."""
        if self.device.type == "cuda":
            try:  # after an illegal access every call fails, whatever it is
                torch.cuda.synchronize()
                torch.ones(1, device=self.device).item()
            except RuntimeError:
                self.broken = True
        self.rows.add(row | {"failed": repr(error)[:2000]} | ({"broke": True} if self.broken else {}))


def _key(row: dict[str, Any]) -> tuple[str, ...] | None:
    """What a row settles, by the kind of its measurement."""
    if row["row"] == "tune":
        return row["case"], row["phase"], row["change"]
    if row["row"] == "step":
        return row["case"], row["contestant"], row["engine"]
    # "both" is the last phase of a contestant
    if row["row"] == "op" and row.get("phase", "both") == "both":
        return row["case"], row["contestant"]
    if row["row"] == "gemm":
        return row["product"], str(row["m"]), str(row["k"]), row["contestant"]
    return None


def finished(what: str, machine: str, commit: str | None, folders: set[Path]) -> frozenset[tuple[str, ...]]:
    """What files of this kind, GPU and commit hold: (case, contestant) of ops, and the like of steps and of tuning.

    A failure is tried again, unless it cost the CUDA context.
    """
    found: set[tuple[str, ...]] = set()
    for path in [path for folder in folders for path in folder.glob(f"{what}-{machine}-*.jsonl")]:
        rows = read_rows(path)
        if not rows or commit is None or rows[0]["commit"] != commit:
            continue
        settled = [row for row in rows if {"median_ms", "refused", "skipped", "broke"} & row.keys()]
        found |= {key for row in settled if (key := _key(row)) is not None}
    return frozenset(found)
