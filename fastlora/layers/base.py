"""LoRALayer: what every drop-in shares, the adapter of one weight (N, K)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoRAConfig, OpSpec
from ..functional import lora_linear
from .packing import stacked
from .weight import AdaptedRows, AdaptedWeight, guard, plain, unguard

__all__ = ["DEFAULT", "STAND_IN", "LoRALayer", "LoRASlot"]

DEFAULT = "default"
_MERGED = "fastlora_merged"
# An attribute of a parameter whose data are those of a cast for a while.
STAND_IN = "_fastlora_cast"


class LoRASlot(nn.Module):
    """Room for one named adapter on one layer: lora_A and lora_B as on LoRALayer. It computes nothing."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter


class LoRALayer(nn.Module):
    """The adapters of one weight (N, K), of which one is active or none; constants of the active one; merging.

    Parameters: lora_A (g, R, K) and lora_B (g · N/G, R), fp32, for the g active of G groups; None where no group is active
    (an attention that stands in only so that its out_proj's adapter is not passed over). Adapters of a name other than
    "default" lie below: named.NAME.lora_A and .lora_B. A key of state_dict belongs to one adapter, whichever is active.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    named: nn.Module | None
    adapter: str | None
    spec: OpSpec
    backend: str | None
    _constants: dict[str, tuple[OpSpec, str | None]]
    _frozen_weight: Tensor | None

    def base_weights(self) -> tuple[Tensor, ...]:
        """The host's frozen parameters that the adapter updates, of one width: their rows, stacked, are the weight (N, K)."""
        raise NotImplementedError

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight (N, K): an alias of the host's one parameter, a view over several that are packed, or a copy."""
        return stacked([plain(weight) for weight in self.base_weights()])

    def _attach(self, site: int, groups: int) -> None:
        """Make room for adapters; there is none yet."""
        self._constants = {}
        self.register_buffer("_frozen_weight", None, persistent=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.named = None
        self.spec = OpSpec(1.0, 0.0, site, tuple(range(groups)), (False,) * groups)
        self.activate(None)
        self.register_load_state_dict_post_hook(_settle)
        self.register_state_dict_post_hook(_say_merged)
        self._settle()

    def _settle(self) -> None:
        """Let the host's parameters know their adapter: again, after what moves, copies or replaces them one by one."""
        guard(self.base_weights(), self)

    def _release(self) -> None:
        """Make the host's parameters what they were."""
        unguard(self.base_weights())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        unguard(self.base_weights())  # torch makes new parameters of what `fn` gives for these
        try:
            return super()._apply(fn, recurse)
        finally:
            self._settle()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._settle()

    def check_rank(self, rank: int) -> None:
        """Raise ValueError where a rank is above the smaller side of a group's weight."""
        parts = self.base_weights()
        width = sum(map(len, parts)) // len(self.spec.active), parts[0].shape[1]
        if rank > min(width):
            raise ValueError(f"rank {rank} is above the width: a weight here is {width}")

    def add(self, name: str, config: LoRAConfig, active: tuple[bool, ...]) -> None:
        """An adapter of the config's rank on the groups that are `active`; nothing where none is. It is not activated."""
        if not any(active):
            return
        n, k = self.base_weight.shape
        device, g = self.base_weight.device, sum(active)
        # kaiming_uniform(a=√5) of each (R, K), as loralib and the paper: bound 1/√K
        a = torch.empty(g, config.rank, k, dtype=torch.float32, device=device).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k))
        b = torch.zeros(g * (n // len(active)), config.rank, dtype=torch.float32, device=device)
        holder: nn.Module = self
        if name != DEFAULT:
            if self.named is None:
                self.named = nn.Module()
            # add_module refuses the names of nn.Module's own attributes, such as "train"
            holder = self.named._modules[name] = LoRASlot().train(self.training)
        holder.lora_A, holder.lora_B = nn.Parameter(a), nn.Parameter(b)
        spec = dataclasses.replace(self.spec, scale=config.scale, dropout=config.dropout, active=active)
        self._constants[name] = spec, config.backend

    def activate(self, name: str | None) -> None:
        """Compute with the adapter called `name`; without one where it is None, or has none on this layer."""
        self.adapter = name
        plain = dataclasses.replace(self.spec, active=(False,) * len(self.spec.active))
        self.spec, self.backend = self._constants.get(name or "", (plain, None))

    def remove(self, name: str) -> None:
        """Drop the adapter called `name`, which must not be active."""
        if self._constants.pop(name, None) is None:
            return
        if name == DEFAULT:
            self.lora_A = self.lora_B = None
        elif self.named is not None:
            del self.named._modules[name]
            self.named = self.named if self.named._modules else None

    @property
    def adapted(self) -> bool:
        """Whether any group has an active adapter."""
        return any(self.spec.active)

    def adapters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of the active adapter on a layer that is `adapted`."""
        assert self.adapter is not None and self.adapted, "no group of this layer is active"
        return self.adapters_of(self.adapter)

    def adapters_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of an adapter that this layer has."""
        holder: Any = self if name == DEFAULT else self.named._modules[name]  # type: ignore[union-attr]
        return holder.lora_A, holder.lora_B

    def names(self) -> tuple[str, ...]:
        """The adapters that this layer has."""
        return tuple(self._constants)

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
            self._check_own()
            self._frozen_weight = self.base_weight.detach().clone()  # before the write, which may be interrupted
            self._write(self._sum(self._frozen_weight))

    @torch.no_grad()
    def rounding(self, dtype: torch.dtype | None = None) -> tuple[float, float, float]:
        """What storing the merged weight in `dtype` (default: its own) costs: largest error, its norm, the update's norm."""
        exact = self.merged_weight()
        error = exact.to(dtype or self.base_weight.dtype).to(exact.dtype) - exact
        return float(error.abs().max()), float(error.norm()), float(self.delta().norm())

    def merged_weight(self) -> Tensor:
        """The weight (N, K) with the active adapter's update, in fp32 or better; whether it is merged at present or not.

        Raises:
            RuntimeError: the weight is a cast that stands in for the host's own.
        """
        self._check_own()
        return self._sum(self.base_weight.detach() if self._frozen_weight is None else self._frozen_weight)

    def _check_own(self) -> None:
        """Raise RuntimeError while casts stand in for the host's parameters: what is made of them would be lost, or rounded."""
        if any(hasattr(weight, STAND_IN) for weight in self.base_weights()):
            raise RuntimeError("the weights are casts inside fastlora.encoders.frozen_in: merge, unmerge and save outside it")

    def _sum(self, frozen: Tensor) -> Tensor:
        return frozen.to(torch.promote_types(frozen.dtype, torch.float32)) + self.delta()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base weight bit for bit."""
        if self._frozen_weight is not None:
            self._check_own()
            self._write(self._frozen_weight)
            self._frozen_weight = None

    def _write(self, weight: Tensor) -> None:
        """Set the host's parameters to the rows of `weight` (N, K)."""
        parts = self.base_weights()
        for part, rows in zip(parts, weight.split([len(part) for part in parts]), strict=True):
            part.copy_(rows)

    def groups_of(self, first: int | None, count: int) -> slice | None:
        """The groups that `count` rows of the weight (N, K) from `first` on are; None where they are no whole groups."""
        width = sum(weight.shape[0] for weight in self.base_weights()) // len(self.spec.active)
        if first is None or count == 0 or first % width or count % width:
            return None
        return slice(first // width, (first + count) // width)

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What torch's `func` gives on this layer's weight or rows of it with the adapter, None where that is not known."""
        return self._linear(*args, **kwargs) if func is F.linear else None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        if not isinstance(weight, (AdaptedWeight, AdaptedRows)) or isinstance(input, (AdaptedWeight, AdaptedRows)):
            return None
        groups = self.groups_of(weight._first, plain(weight).shape[0])
        return None if groups is None else self._project(input, bias, None, None, groups)

    def _project(
        self, x: Tensor, bias: Tensor | None, seed: Tensor | None, rows: Tensor | None, groups: slice = slice(None)
    ) -> Tensor:
        """The op on the chosen groups (a slice of the G groups: q alone is slice(0, 1)), with their part of the bias."""
        weight: Tensor = self.base_weight
        spec = self.spec
        active = spec.active[groups]
        if active != spec.active:
            width = len(weight) // len(spec.active)
            span = slice((groups.start or 0) * width, (groups.start or 0) * width + len(active) * width)
            weight = weight[span]
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(f"{prefix[:-1]} is merged, and would lose its adapter: call fastlora.unmerge(model) first")
        if (local_metadata or {}).get(_MERGED) and self.adapted:
            raise RuntimeError(
                f"{prefix[:-1]} was merged when its state_dict was taken, and the update would count twice: take it after"
                " fastlora.unmerge(model), or load it into a plain model"
            )
        # a plain checkpoint of the host loads with strict=True: the adapters stay as they are
        for name in self._constants:
            below = prefix if name == DEFAULT else f"{prefix}named.{name}."
            for key, parameter in zip(("lora_A", "lora_B"), self.adapters_of(name), strict=True):
                state_dict.setdefault(below + key, parameter.detach())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()] if super().extra_repr() else []
        if self.adapted:
            parts.append(f"lora rank={self.adapters()[0].shape[1]}, groups={sum(self.spec.active)}/{len(self.spec.active)}")
        return ", ".join(parts)


def _say_merged(module: nn.Module, state_dict: Any, prefix: str, local_metadata: dict[str, Any]) -> None:
    if isinstance(module, LoRALayer) and module.merged:
        local_metadata[_MERGED] = True  # torch.save keeps it beside the state_dict


def _settle(module: nn.Module, _: Any) -> None:
    assert isinstance(module, LoRALayer)
    module._settle()
