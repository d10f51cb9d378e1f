"""Where a run computes, and in what precision."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from .errors import UserError

__all__ = ["choose_device", "choose_dtype", "current"]


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for fp32: on "auto" bf16 on a GPU that has it, else fp16, and fp32 on the CPU.

    Raises:
        UserError: fp16 on the CPU.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        with current(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU: choose fp32 or bf16 on the CPU")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within: a GPU is the one that torch takes where none is named: for streams, events, captures, barriers."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
