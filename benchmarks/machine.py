"""What a run was measured on: machine, versions, commit, and two ceilings of this very run, GEMM speed and copy bandwidth."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rows import RESULTS, ROOT

# what a row calls them, and the names of their distributions
_PACKAGES = {name: name for name in ("torch", "triton", "open_clip_torch", "peft", "numpy")} | {"fastlora": "fastlora-clip"}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: flops in FLOP/s of a large matrix product, bandwidth in B/s (read plus written) of a copy."""

    device: str
    dtype: str
    flops: float
    bandwidth: float

    def seconds(self, flops: float, nbytes: float) -> float:
        """The roofline: no version of the work runs much faster than the larger of the two times."""
        return max(flops / self.flops, nbytes / self.bandwidth)


def synchronize(device: torch.device) -> None:
    """Wait for the device; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_time(work: Callable[[], object], device: torch.device, budget: float) -> float:
    """Median seconds of one call, over as many as fit into `budget` seconds after one warm-up, three at least."""
    work()
    synchronize(device)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(device: torch.device, dtype: torch.dtype, budget: float = 1.0, size: int | None = None) -> Ceilings:
    """GEMM speed on random data (zeros run faster than real ones) and copy bandwidth, `budget` seconds in all.

    Args:
        size: side of the square product; None for one that fills the device.
    """
    side = size or (8192 if device.type == "cuda" else 1536)
    x, w = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    gemm = _best_time(lambda: torch.mm(x, w, out=out), device, budget / 2)
    elements = side * side * (16 if device.type == "cuda" else 8)  # far beyond any cache
    source = torch.randn(elements, device=device).to(dtype)
    target = torch.empty_like(source)
    copy = _best_time(lambda: target.copy_(source), device, budget / 2)
    return Ceilings(str(device), str(dtype).removeprefix("torch."), 2 * side**3 / gemm, 2 * source.nbytes / copy)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Everything one needs to know to read a row: date, commit, versions, CPU, GPU and driver.

    Args:
        commit: what the tree was copied from, where it has no .git of its own.
    """
    own = _output("git", "rev-parse", "--short=12", "HEAD")
    row: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": own or (commit[:12] if commit else None),
        # of what measures: rows that an earlier part wrote are no change
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--", ".", f":!{RESULTS}")) if own else None,
        "python": platform.python_version(),
        "versions": {name: _version(package) for name, package in _PACKAGES.items()},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        row |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": driver.splitlines()[0] if driver else None,
        }
    return row
