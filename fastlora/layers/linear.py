"""LoRALinear: nn.Linear with an adapter."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LoRALayer

__all__ = ["LoRALinear"]


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear with an adapter; with G groups, one packed q, k, v projection."""

    def base_weights(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    def forward(self, x: Tensor, *, seed: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N). `seed` and `rows` key the dropout mask as in `fastlora.lora_linear`."""
        return self._project(x, self.bias, seed, rows)
