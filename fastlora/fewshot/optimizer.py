"""Beside AdamW: groups of parameters with rates of their own, and the mean of the weights of the last steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .models import trained_state
from .recipe import Recipe

__all__ = ["Average", "parameter_groups"]


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trained parameters, each group with its "ratio": its learning rate over the schedule's.

    One group, or with `recipe.lr_ratio` other than 1 lora_A and lora_B apart, as in Hayou et al., "LoRA+: Efficient Low Rank
    Adaptation of Large Models", ICML 2024, arXiv 2402.12354.
    """
    trained = trained_state(model)
    if recipe.lr_ratio == 1:
        return [{"params": list(trained.values()), "ratio": 1.0}]
    b = [p for name, p in trained.items() if name.endswith("lora_B")]
    rest = [p for name, p in trained.items() if not name.endswith("lora_B")]
    return [{"params": rest, "ratio": 1.0}, {"params": b, "ratio": recipe.lr_ratio}]


class Average:
    """The mean of weights over the last steps of a run.

    A and B are averaged apart, not their product; over steps that lie close together the difference is small.

    Args:
        parameters: what is averaged.
        first: the first step, from 1, whose weights count.
    """

    def __init__(self, parameters: Sequence[Tensor], first: int) -> None:
        self.parameters, self.first = list(parameters), first
        self.mean = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`; nothing is read from the device."""
        if step >= self.first:
            torch._foreach_lerp_(self.mean, self.parameters, 1 / (step - self.first + 1))

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in place of the weights."""
        torch._foreach_copy_(self.parameters, self.mean)
