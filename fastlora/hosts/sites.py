"""Sites and towers, and how a family's blocks are found in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

__all__ = ["QKV", "Layout", "Site", "Tower", "has", "separate", "tower"]

QKV = ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Site:
    """One module that can take an adapter.

    Args:
        path: the module within the model: a Linear, an nn.MultiheadAttention, or with `weights` an attention of the host's own.
        targets: what its groups of rows are: ("q", "k", "v"), or one of ("o",), ("fc1",), ("fc2",); () for a whole weight that
            was chosen by its name.
        weights: the parameters within the module that hold q, k, v (all in one, or one each), where the module's own forward
            gives them to F.linear.
        carries: targets of sites inside this module that it reads without calling them, so that their adapters work only with
            the drop-in around them.
    """

    path: str
    targets: tuple[str, ...]
    weights: tuple[str, ...] = ()
    carries: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tower:
    """One encoder: the sites of its blocks from bottom to top.

    Args:
        encoder: "text" or "vision".
        refused: path -> why it cannot be adapted: the tower itself where it has no blocks, or a single block.
    """

    encoder: str
    blocks: tuple[tuple[Site, ...], ...]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where one block keeps its projections, as paths within the block.

    Args:
        attention: a Linear or nn.MultiheadAttention of packed q, k, v; or with `weights` the attention around them.
        weights: as in `Site`.
        out: the output projection.
        fc1, fc2: the Linears before and after the activation of the MLP; a gated MLP has two before it.
    """

    attention: str
    weights: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    fc1: tuple[str, ...] = ()
    fc2: tuple[str, ...] = ()

    def sites(self, block: nn.Module, path: str) -> tuple[Site, ...]:
        """The sites of `block`, which lies at `path` of the model."""
        attention = block.get_submodule(self.attention)
        carries = ("o",) if isinstance(attention, nn.MultiheadAttention) else ()
        sites = [Site(f"{path}.{self.attention}", QKV, self.weights, carries)]
        if len({attention.get_parameter(name).shape for name in self.weights}) > 1:  # grouped-query attention
            paths = (f"{path}.{self.attention}.{name.removesuffix('.weight')}" for name in self.weights)
            sites = [Site(part, (target,)) for part, target in zip(paths, QKV, strict=True)]
        for target, names in (("o", self.out), ("fc1", self.fc1), ("fc2", self.fc2)):
            sites += [Site(f"{path}.{name}", (target,)) for name in names]
        return tuple(sites)


def separate(*names: str) -> tuple[str, ...]:
    """The weights of the Linears `names`."""
    return tuple(f"{name}.weight" for name in names)


def has(block: nn.Module, *paths: str) -> bool:
    """Whether `block` has a module at each of the paths."""
    found = {name for name, _ in block.named_modules()}
    return found.issuperset(paths)


def tower(model: nn.Module, encoder: str, path: str, layout: Callable[[nn.Module], Layout | None], looked_for: str) -> Tower:
    """The tower at `path` of `model`: the blocks of every list of modules in which `layout` knows one.

    Args:
        layout: the layout of a block, or None for a module that is none of the family's blocks.
        looked_for: what `layout` knows, in words, for the refusal of what has none.
    """
    root = model.get_submodule(path)
    blocks: list[tuple[Site, ...]] = []
    refused: dict[str, str] = {}
    for name, module in root.named_modules(prefix=path):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        layouts = {f"{name}.{child}": (block, layout(block)) for child, block in module.named_children()}
        if not any(known for _, known in layouts.values()):
            continue
        blocks += [known.sites(block, where) for where, (block, known) in layouts.items() if known]
        refused |= {where: f"{_kind(block)} has no {looked_for}" for where, (block, known) in layouts.items() if not known}
    return Tower(encoder, tuple(blocks), refused if blocks else {path: f"{_kind(root)} has no blocks with {looked_for}"})


def _kind(root: nn.Module) -> str:
    """The name of a module's class, and of what it wraps."""
    inner = getattr(root, "trunk", None)
    return type(root).__name__ + (f" ({type(inner).__name__})" if inner is not None else "")
