"""Beside AdamW: groups of parameters with rates of their own, and the mean of the weights of the last steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .models import trained_state
from .recipe import Recipe

__all__ = ["Average", "adamw", "capturable", "parameter_groups"]


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


def adamw(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.AdamW:
    """AdamW that a CUDA graph can capture: one fused kernel, step count and learning rates on the device."""
    groups = parameter_groups(model, recipe)
    rate = torch.zeros((), dtype=torch.float32, device=device)  # TrainStep sets it at each step
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)
    return capturable(optimizer, device)


def capturable(optimizer: torch.optim.AdamW, device: torch.device) -> torch.optim.AdamW:
    """Put `optimizer` into the form that `adamw` gives it; loading a state undoes that."""
    for group in optimizer.param_groups:
        group["lr"], group["capturable"] = torch.zeros((), dtype=torch.float32, device=device), device.type == "cuda"
    return optimizer


class Average:
    """The mean of weights over the last steps of a run.

    A and B are averaged apart, not their product; over steps that lie close together the difference is small.

    Args:
        parameters: what is averaged.
        share: of the run's steps, the last ones; one step at least.
        steps: of the whole run.
    """

    def __init__(self, parameters: Sequence[Tensor], share: float, steps: int) -> None:
        self.parameters = list(parameters)
        self.mean = [torch.zeros_like(p, requires_grad=False) for p in self.parameters]
        taken = torch.arange(steps) - (steps - max(1, round(share * steps)))
        # the k-th step that counts moves the mean by 1/k of the way to its weights, those before by nothing
        self.weights = torch.where(taken < 0, 0.0, 1 / (taken + 1).clamp(min=1)).to(self.mean[0].device)

    @torch.no_grad()
    def update(self, step: Tensor) -> None:
        """Take in the weights after step 0, 1, … (int64 (1,), on the device); nothing is read from the device."""
        difference = torch._foreach_sub(self.parameters, self.mean)
        torch._foreach_mul_(difference, self.weights.index_select(0, step)[0])
        torch._foreach_add_(self.mean, difference)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the mean in place of the weights."""
        torch._foreach_copy_(self.parameters, self.mean)
