"""Naive LoRA as in textbooks: y = W x + b + scale · B(A(dropout(x))), one nn.Linear at a time."""

from __future__ import annotations

from torch import Tensor, nn

from .common import Compiled, SeparateTrainee


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


class CompiledTextbook(Compiled, Textbook):
    """Its encoders by torch.compile."""

    name = "torch.compile(textbook)"
