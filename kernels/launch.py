"""One door to the GPU: every kernel is started by `launch`, so that `recording` can see exactly what would be compiled."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from .tiles import Tile

__all__ = ["Launch", "launch", "recording"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One start of a kernel: its arguments by name (tensors, numbers, None, constants) and its launch configuration."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int

    def compile(self) -> Any:
        """Compile it for the GPU that is here, into Triton's cache, and start nothing; gives Triton's compiled kernel."""
        return self.kernel.warmup(grid=(self.programs,), **self.arguments, num_warps=self.warps, num_stages=self.stages)


_recorder: list[Launch] | None = None


def _device_of(arguments: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one, where Triton starts kernels."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            elsewhere = value.device.index != torch.cuda.current_device()
            return torch.cuda.device(value.device) if elsewhere else contextlib.nullcontext()
    return contextlib.nullcontext()


def launch(kernel: Any, programs: int, tile: Tile, /, **arguments: Any) -> None:
    """Start `programs` programs of a Triton kernel on its tensors' device, or note them where a recording is on."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, arguments, tile.warps, tile.stages))
    else:
        with _device_of(arguments):
            kernel[(programs,)](**arguments, num_warps=tile.warps, num_stages=tile.stages)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it nothing is started; the launches that would have been are in the list. Takes tensors on "meta"."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before
