"""Memory of a run: the peaks of the process and of torch's allocator on a GPU; keeping what is freed for the next step."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import torch

__all__ = ["keep_freed", "peak", "reset_peak"]


def keep_freed() -> bool:
    """Let this process keep what it frees: a step's large tensors then lie on the pages of the step before.

    glibc gives every tensor of 32 MB and more fresh pages, which the kernel must map and clear in every step. The process holds
    its peak from then on. False where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    no_mmap, trim_threshold, top_pad = -4, -1, -2  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
    return all([mallopt(no_mmap, 0), mallopt(trim_threshold, -1), mallopt(top_pad, 2**26)])


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
