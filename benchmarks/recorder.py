"""The rows of one session of `pytest benchmarks/`, and the floors that later rows are compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.rows import FLOOR
from machine import Ceilings, ceilings, environment
from rows import Rows


class Recorder:
    """Measures the ceilings of a dtype when it is first asked for, and writes every row with its ratio to the floor."""

    def __init__(self, profile: str, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.profile = profile
        header = environment(self.device)
        stamp = header["date"].replace(":", "").replace("-", "")[:15]
        self.limits: dict[torch.dtype, Ceilings] = {}
        self.rows = Rows(folder / f"{profile}-{header.get('gpu', 'cpu')}-{stamp}.jsonl".replace(" ", "-").lower(), header)
        self.floors: dict[tuple[str, str, str], float] = {}

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        """GEMM speed and copy bandwidth, measured once a session and dtype."""
        if dtype not in self.limits:
            tiny = self.profile == "tiny"
            self.limits[dtype] = ceilings(self.device, dtype, 0.01 if tiny else 1.0, size=128 if tiny else None)
            self.rows.add({"row": "ceilings", **dataclasses.asdict(self.limits[dtype])})
        return self.limits[dtype]

    def add(self, row: dict[str, Any]) -> dict[str, float]:
        """Write a timed row, and return its ratio to the floor where that is known."""
        key = (row["case"], row["phase"], row["method"])
        if row["contestant"] == FLOOR:
            self.floors[key] = row["median_ms"]
        ratio = {"over_frozen": row["median_ms"] / self.floors[key]} if key in self.floors else {}
        self.rows.add(row | ratio)
        return ratio
