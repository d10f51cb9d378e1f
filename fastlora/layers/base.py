"""LoRALayer: what every drop-in shares, the adapter of one weight (N, K)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoRAConfig, OpSpec
from ..functional import lora_linear
from .packing import stacked

__all__ = ["LoRALayer"]


class LoRALayer(nn.Module):
    """The adapter of one weight (N, K), its constants, merging.

    Parameters: lora_A (g, R, K) and lora_B (g · N/G, R), fp32, for the g active of G groups; None where no group is active
    (an attention that stands in only so that its out_proj's adapter is not passed over).
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    spec: OpSpec
    backend: str | None
    _frozen_weight: Tensor | None

    def base_weights(self) -> tuple[Tensor, ...]:
        """The host's frozen parameters that the adapter updates, of one width: their rows, stacked, are the weight (N, K)."""
        raise NotImplementedError

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight (N, K): the host's one parameter, a view over several that are packed, or a copy."""
        return stacked(self.base_weights())

    def _attach(self, config: LoRAConfig, site: int, active: tuple[bool, ...]) -> None:
        n, k = self.base_weight.shape
        self.spec = OpSpec(config.scale, config.dropout, site, tuple(range(len(active))), active)
        self.backend = config.backend
        self.register_buffer("_frozen_weight", None, persistent=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        if not self.adapted:
            return
        device, g = self.base_weight.device, sum(active)
        # kaiming_uniform(a=√5) of each (R, K), as loralib and the paper: bound 1/√K
        a = torch.empty(g, config.rank, k, device=device).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k))
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(g * (n // len(active)), config.rank, device=device))

    @property
    def adapted(self) -> bool:
        """Whether any group has an adapter."""
        return any(self.spec.active)

    def adapters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of a layer that is `adapted`."""
        assert self.lora_A is not None and self.lora_B is not None, "no group of this layer is active"
        return self.lora_A, self.lora_B

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update at present."""
        return self._frozen_weight is not None

    def delta(self) -> Tensor:
        """scale · B A of every group, zero where a group has no adapter: (N, K), fp32."""
        weight = self.base_weight
        delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        lora_a, lora_b = self.adapters()
        for (_, rows), a, b in zip(self.spec.spans(len(weight)), lora_a, lora_b.chunk(len(lora_a)), strict=True):
            delta[rows] = self.spec.scale * (b.float() @ a.float())
        return delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight, summed in fp32; the weight as it was is kept for `unmerge`."""
        if self.adapted and not self.merged:
            frozen = self.base_weight.detach().clone()
            self._write(frozen.float() + self.delta())
            self._frozen_weight = frozen

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base weight bit for bit."""
        if self._frozen_weight is not None:
            self._write(self._frozen_weight)
            self._frozen_weight = None

    def _write(self, weight: Tensor) -> None:
        """Set the host's parameters to the rows of `weight` (N, K)."""
        parts = self.base_weights()
        for part, rows in zip(parts, weight.split([len(part) for part in parts]), strict=True):
            part.copy_(rows)

    def _project(
        self, x: Tensor, bias: Tensor | None, seed: Tensor | None, rows: Tensor | None, groups: slice = slice(None)
    ) -> Tensor:
        """The op on the chosen groups (a slice of the G groups: q alone is slice(0, 1))."""
        weight: Tensor = self.base_weight
        spec = self.spec
        active = spec.active[groups]
        if active != spec.active:
            width = len(weight) // len(spec.active)
            span = slice((groups.start or 0) * width, (groups.start or 0) * width + len(active) * width)
            weight, bias = weight[span], None if bias is None else bias[span]
        if self.merged or not any(active):
            if self.merged and self.training and torch.is_grad_enabled() and self.adapters()[1].requires_grad:
                raise RuntimeError("a merged adapter cannot be trained: call fastlora.unmerge(model) first")
            return F.linear(x, weight, bias)
        lora_a: Tensor
        lora_b: Tensor
        lora_a, lora_b = self.adapters()
        if active != spec.active:
            width = len(lora_b) // len(lora_a)
            first = sum(spec.active[: groups.start or 0])
            lora_a, lora_b = lora_a[first : first + sum(active)], lora_b[first * width : (first + sum(active)) * width]
        return lora_linear(
            x, weight, bias, lora_a, lora_b, scale=spec.scale, dropout=spec.dropout if self.training else 0.0, seed=seed,
            site=spec.site, rows=rows, groups=spec.groups[groups], active=active, backend=self.backend,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a plain checkpoint of the host loads with strict=True: the adapter stays as it is
        if self.adapted:
            for name, parameter in zip(("lora_A", "lora_B"), self.adapters(), strict=True):
                state_dict.setdefault(prefix + name, parameter.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()] if super().extra_repr() else []
        if self.adapted:
            parts.append(f"lora rank={self.adapters()[0].shape[1]}, groups={sum(self.spec.active)}/{len(self.spec.active)}")
        return ", ".join(parts)
