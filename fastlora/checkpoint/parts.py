"""An adapter taken apart: one (A, B) for each projection of each block, whatever the host packs and however a format names it.

Foreign formats are read into parts and written from them. A packed q, k, v module has one rank: parts of a lower rank, or
missing ones, are filled with zeros in A and in B, which changes no output and no gradient (both stay zero in training).
"""

from __future__ import annotations

import collections
import dataclasses
import glob
from typing import Literal

import torch
from torch import Tensor, nn

from .. import hosts
from ..beside import Kept, whole
from ..config import ENCODERS, LAYERS, TARGETS, LoRAConfig
from ..plan import Plan
from ..record import config_of, lora_layers
from .network import Network

__all__ = ["ForeignAdapter", "Part", "Place", "Scaling", "Slot", "parts_of", "slots"]

Scaling = Literal["alpha/sqrt(r)", "alpha/r"]


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """A projection in any CLIP: encoder ("text", "vision"), block number, target ("q", "k", "v", "o", "fc1", "fc2").

    `number` tells apart several of one target in a block, as a gated MLP's two fc1.
    """

    encoder: str
    block: int
    target: str
    number: int = 0


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a place is in a model.

    Args:
        path: the module's.
        group: which of the groups of its rows.
        linear: the nn.Linear that holds it, alone or packed with others; None inside an nn.MultiheadAttention.
    """

    path: str
    group: int
    linear: str | None


@dataclasses.dataclass(frozen=True)
class Part:
    """One projection's update: a (R, K), b (n, R), alpha, and the name it goes by in its file."""

    a: Tensor
    b: Tensor
    alpha: float
    name: str = ""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


def slots(model: nn.Module) -> dict[Place, Slot]:
    """Every projection of a model that an adapter can be on, text tower first, block by block.

    Raises:
        TypeError: a model of no known family.
    """
    found: dict[Place, Slot] = {}
    for tower in hosts.towers(model):
        for i, block in enumerate(tower.blocks):
            met: collections.Counter[str] = collections.Counter()
            for site in block:
                for group, target in enumerate(site.targets):
                    found[Place(tower.encoder, i, target, met[target])] = Slot(site.path, group, _linear(model, site, group))
                    met[target] += 1
    return found


def _linear(model: nn.Module, site: hosts.Site, group: int) -> str | None:
    """The path of the nn.Linear that holds a group of a site."""
    if not site.weights:
        return None if isinstance(model.get_submodule(site.path), nn.MultiheadAttention) else site.path
    weight = site.weights[group if len(site.weights) > 1 else 0]
    return f"{site.path}.{weight.removesuffix('.weight')}" if weight.endswith(".weight") else None


def parts_of(model: nn.Module) -> dict[Place, Part]:
    """The active adapter of a patched model, part by part, in the order of `slots`.

    Raises:
        TypeError: a model of no known family.
        ValueError: it is on a module that is no projection of a known block.
    """
    layers, config = dict(lora_layers(model)), config_of(model)
    assert config is not None
    parts = {}
    where = slots(model)
    if other := {path for path, layer in layers.items() if layer.adapted} - {slot.path for slot in where.values()}:
        raise ValueError(
            f"only fastlora's own format holds an adapter on {min(other)}, which is no projection of a known block"
        )
    for place, slot in where.items():
        layer = layers.get(slot.path)
        if layer is None or not layer.spec.active[slot.group]:
            continue
        index = sum(layer.spec.active[: slot.group])
        a, b = (whole(parameter).float().cpu() for parameter in layer.adapters())
        parts[place] = Part(a[index], b.chunk(len(a))[index], config.alpha, slot.path)
    return parts


@dataclasses.dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another library, ready to be put on a model.

    Args:
        source: the file or folder, for messages.
        parts: what it holds.
        scaling: how a rank scales there.
        dropout: what it was trained with.
        beside: what was trained beside it, by its name in the model.
        network: what it was trained on, where fastlora wrote it.
    """

    source: str
    parts: dict[Place, Part]
    scaling: Scaling
    dropout: float
    beside: dict[str, Kept] = dataclasses.field(default_factory=dict)
    network: Network | None = None

    def config(self, model: nn.Module, patched: LoRAConfig | None) -> LoRAConfig:
        """The LoRAConfig whose modules hold the parts; dropout and backend are those of a patched model.

        Raises:
            ValueError: a part that the model has no place for.
        """
        where = slots(model)
        for place, part in self.parts.items():
            if place not in where:
                raise ValueError(f"{self.source} is for another model: {part.name} is {place}, which this one does not have")
        ranks = {path: max(self.parts[place].rank for place in places) for path, places in self._modules(where).items()}
        ((rank, _),) = collections.Counter(ranks.values()).most_common(1)
        first = next(part for part in self.parts.values() if part.rank == rank)
        chosen = {(place.encoder, place.block) for place in self.parts}
        encoders = tuple(encoder for encoder in ENCODERS if any(e == encoder for e, _ in chosen))
        config = LoRAConfig(
            rank=rank,
            alpha=first.alpha,
            dropout=self.dropout if patched is None else patched.dropout,
            targets=tuple(target for target in TARGETS if any(place.target == target for place in self.parts)),
            encoders=encoders,
            layers=_layers(chosen, where, encoders),
            scaling=self.scaling,
            backend=None if patched is None else patched.backend,
        )
        # what the options choose beyond the parts has no adapter; exact paths, so brackets in them are escaped
        pattern: dict[str | int, int] = {
            glob.escape(slot.path): ranks.get(slot.path, 0)
            for place, slot in where.items()
            if place.target in config.targets and place.encoder in encoders
            if place.block in config.layer_indices(_depth(where, place.encoder)) and ranks.get(slot.path, 0) != rank
        }
        return dataclasses.replace(config, rank_pattern=pattern)

    def tensors(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """The parts packed as the planned modules hold them, in fp32, by the names that a native file has.

        Raises:
            ValueError: a part of another shape than its module.
        """
        packed = {}
        for path, places in self._modules(slots(model)).items():
            if (module := plan.modules.get(path)) is None:
                raise ValueError(f"{self.source} is for another model: {path} cannot have an adapter here")
            active = [i for i, on in enumerate(module.active) if on]
            a, b = (torch.zeros(shape, dtype=torch.float32) for shape in module.shapes)
            b = b.view(len(active), -1, module.config.rank)
            for place, slot in places.items():
                part, index = self.parts[place], active.index(slot.group)
                r, k, n = part.rank, a.shape[2], b.shape[1]
                if part.a.shape != (r, k) or part.b.shape != (n, r):
                    raise ValueError(
                        f"{self.source} is for another model: {part.name} has A {tuple(part.a.shape)} and B"
                        f" {tuple(part.b.shape)}, here A ({r}, {k}) and B ({n}, {r}) are needed"
                    )
                a[index, :r] = part.a
                b[index, :, :r] = part.b.float() * (
                    self._scale(part) / module.config.scale
                )  # 1.0 but for its own rank or alpha
            packed[f"{path}.lora_A"], packed[f"{path}.lora_B"] = a, b.flatten(0, 1)
        return packed

    def check_base(self, model: nn.Module, plan: Plan) -> None:
        """Foreign files say nothing of the base's weights."""

    def _scale(self, part: Part) -> float:
        return LoRAConfig(rank=part.rank, alpha=part.alpha, scaling=self.scaling).scale

    def _modules(self, where: dict[Place, Slot]) -> dict[str, dict[Place, Slot]]:
        """The parts' places by the path of their module."""
        modules: dict[str, dict[Place, Slot]] = collections.defaultdict(dict)
        for place in self.parts:
            modules[where[place].path][place] = where[place]
        return modules


def _depth(where: dict[Place, Slot], encoder: str) -> int:
    return 1 + max(place.block for place in where if place.encoder == encoder)


def _layers(chosen: set[tuple[str, int]], where: dict[Place, Slot], encoders: tuple[str, ...]) -> str | tuple[int, ...]:
    """The name of the chosen blocks, else their numbers, else "all", of which rank_pattern then leaves some out."""
    depths = {encoder: _depth(where, encoder) for encoder in encoders}
    for name in LAYERS:
        if {(e, i) for e in encoders for i in LoRAConfig(layers=name).layer_indices(depths[e])} == chosen:
            return name
    indices = tuple(sorted({index for _, index in chosen}))
    return indices if indices[-1] < min(depths.values()) else "all"
