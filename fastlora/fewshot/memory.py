"""Peak memory of a run: the process's resident size, and what torch's allocator held on a GPU."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

__all__ = ["peak", "reset_peak"]


def reset_peak(device: torch.device) -> None:
    """Forget the peaks so far, as far as the system lets us: Linux does for the process, torch for the GPU."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> dict[str, int]:
    """Bytes since the last `reset_peak` (where it could not, since the process began): "process", and "gpu" on a GPU."""
    values = {"process": _process()}
    if device.type == "cuda":
        values["gpu"] = torch.cuda.max_memory_allocated(device)
    return values


def _process() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size if sys.platform == "darwin" else size * 1024  # macOS counts bytes, others KiB
