"""One door to the GPU: every kernel is started by `launch`, so that `recording` can see exactly what would be compiled."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

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


def launch(kernel: Any, programs: int, tile: Tile, /, **arguments: Any) -> None:
    """Start `programs` programs of a Triton kernel, or note them where a recording is on."""
    if _recorder is not None:
        _recorder.append(Launch(kernel, programs, arguments, tile.warps, tile.stages))
    else:
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
