"""Whether attention over packed rows is right on the kernels of a GPU: torch's varlen attention, and xformers'."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["attention", "missing"]


def missing(kernel: str) -> str | None:
    """Why "varlen" or "xformers" cannot run here, or None."""
    raise NotImplementedError


def attention(
    device: torch.device, kernel: str, dtype: torch.dtype, *, prompts: int = 100, images: int = 32, tokens: int = 197,
    prefix: int = 5, heads: tuple[int, int] = (8, 12), head: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """`attend` and `attend_pooled` forced to a kernel, forward and gradients, are within the error rule.

    Args:
        kernel: "varlen" or "xformers"; "sdpa" or "cpu" on a CPU.
        prompts: causal, of 8 to 18 tokens in turn, with and without a shared prefix.
        images: of `tokens` each, not causal.
        heads: of text and images, each `head` wide.
    """
    raise NotImplementedError
