"""On which modules an adapter will be, and of which shapes: all that can be known without touching the model."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from . import hosts
from .config import LoRAConfig
from .layers import LoRALayer, refusal, tied
from .layers.packing import stacked

__all__ = ["Plan", "Planned", "plan"]


@dataclasses.dataclass(frozen=True)
class Planned:
    """One module.

    Args:
        config: with the rank of this module.
        site, active, weights: as `adopt` takes them.
        base: the tensors whose rows, stacked, are the plain weight (N, K).
    """

    config: LoRAConfig
    site: int
    active: tuple[bool, ...]
    weights: tuple[str, ...]
    base: tuple[Tensor, ...]

    @property
    def base_weight(self) -> Tensor:
        """The weight (N, K) under the adapter, without its update."""
        return stacked(self.base)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of lora_A (g, R, K) and lora_B (g · N/G, R)."""
        n, k, g, rank = sum(map(len, self.base)), self.base[0].shape[1], sum(self.active), self.config.rank
        return (g, rank, k), (g * (n // len(self.active)), rank)


@dataclasses.dataclass(frozen=True)
class Plan:
    """An adapter's modules by path, text tower first; path of a tower or module -> why it is left alone."""

    config: LoRAConfig
    modules: dict[str, Planned]
    skipped: dict[str, str]

    @property
    def adapted(self) -> dict[str, Planned]:
        """The modules that have parameters: all but such as only stand around one of them."""
        return {path: module for path, module in self.modules.items() if any(module.active)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's parameters by their names in a file, `<path>.lora_A` and `<path>.lora_B`."""
        return {
            f"{path}.{name}": shape
            for path, module in self.adapted.items()
            for name, shape in zip(("lora_A", "lora_B"), module.shapes, strict=True)
        }


def plan(model: nn.Module, config: LoRAConfig, originals: dict[str, nn.Module]) -> Plan:
    """What `config` adapts in `model`, whether it is patched or not.

    Args:
        originals: the host's own modules in the places where adapted ones stand.

    Raises:
        TypeError: a model of no known family.
        ValueError: nothing to adapt, or an option that fits nothing.
    """
    found: dict[str, Planned] = {}
    chosen: list[tuple[str, int]] = []
    groups, skipped = _groups(model, config)
    seen: dict[int, str] = {}
    shared = tied(model)
    for block, group in groups:
        wanted = {site.path for _, site in group if not site.targets or set(site.targets) & set(config.targets)}
        chosen += [(path, block) for path in wanted]
        own = {site.path: config.at(site.path, block) if site.path in wanted else None for _, site in group}
        for number, site in group:
            carried = any(own[other.path] and set(other.targets) & set(site.carries) for _, other in group)
            if own[site.path] is None and not carried:
                continue
            module = model.get_submodule(site.path)
            first = seen.setdefault(id(module), site.path)
            why = (
                refusal(originals.get(site.path, module), site.weights, shared)
                if first == site.path
                else f"it is the same module as {first}"
            )
            if why is not None:
                skipped[site.path] = why
                continue
            active = tuple(own[site.path] is not None and t in config.targets for t in site.targets) or (True,)
            base = _base(module, site.weights)
            found[site.path] = Planned(own[site.path] or config, number, active, site.weights, base)
    if unused := config.unused_patterns(chosen):
        raise ValueError(f"rank_pattern has {unused[0]!r}, which fits no module that the other options choose")
    if not found:
        why = (
            "; ".join(f"{path}: {why}" for path, why in skipped.items())
            or "rank_pattern gives every module rank 0, or targets names none of what was chosen"
        )
        raise ValueError(f"nothing to adapt: {why}")
    return Plan(config, found, skipped)


def _base(module: nn.Module, weights: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The weights under an adapter on `module`: its own parameters, or what they were before a merge."""
    if isinstance(module, LoRALayer):
        return module.base_weights() if module._frozen_weight is None else (module._frozen_weight,)
    names = weights or ("in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight",)
    return tuple(module.get_parameter(name) for name in names)


_Group = tuple[int, list[tuple[int, hosts.Site]]]


def _groups(model: nn.Module, config: LoRAConfig) -> tuple[list[_Group], dict[str, str]]:
    """Each chosen block and its sites, numbered alike whatever else is chosen; path -> reason of what has none.

    Modules that were chosen by name stand in no block: -1.
    """
    if config.modules:
        found, skipped = hosts.named(model, config.modules)
        return [(-1, [(2 * place + i, site) for i, site in enumerate(group)]) for place, group in found.items()], skipped
    groups: list[_Group] = []
    skipped = {}
    for tower_number, tower in enumerate(hosts.towers(model)):
        if tower.encoder not in config.encoders:
            continue
        skipped |= tower.refused
        for index in config.layer_indices(len(tower.blocks)) if tower.blocks else ():
            numbers = (((kind // 4 * 64 + tower_number) * 1024 + index) * 4 + kind % 4 for kind in range(16))
            groups.append((index, list(zip(numbers, tower.blocks[index], strict=False))))
    return groups, skipped
