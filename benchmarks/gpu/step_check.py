"""Whether a captured training step takes the steps of the eager engine."""

from __future__ import annotations

from typing import Any

import torch

from .checks import Capture

__all__ = ["captured_step"]


def captured_step(
    device: torch.device, *, dtype: torch.dtype | None = None, steps: int = 6, batch: int = 8, capture: Capture | None = None
) -> dict[str, Any]:
    """Some few-shot steps of the mini CLIP, captured once and replayed, have the losses of the eager engine.

    Args:
        dtype: what the towers compute in; None for float32.
        capture: as in `checks.replays`.
    """
    raise NotImplementedError
