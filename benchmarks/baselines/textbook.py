"""Naive LoRA as in textbooks: y = W x + b + scale · B(A(dropout(x))), one nn.Linear at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .common import Adapters, Job, SeparateTrainee


class NaiveLinear(nn.Module):
    """A frozen linear (N, K) with lora_A (R, K) and lora_B (N, R), fp32."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        low = nn.functional.linear(self.dropout(x), self.lora_A)
        return self.linear(x) + self.scale * nn.functional.linear(low, self.lora_B)


class Textbook(SeparateTrainee):
    """Tokens are made once; prompts are encoded by the host, at its full context length."""

    name = "textbook"

    def adapted(self, linear: nn.Linear, a: Tensor, b: Tensor) -> nn.Module:
        return NaiveLinear(linear, a, b, self.job.scale, self.job.dropout)


class CompiledTextbook(Textbook):
    """Its encoders by torch.compile."""

    name, compiles = "torch.compile(textbook)", True

    def __init__(self, job: Job, adapters: Adapters) -> None:
        super().__init__(job, adapters)
        self._image = torch.compile(super().image_features, dynamic=False)
        self._text = torch.compile(super().text_features, dynamic=False)

    def image_features(self, images: Tensor) -> Tensor:
        return self._image(images)

    def text_features(self, first: int = 0, last: int | None = None) -> Tensor:
        return self._text(first, last)
