"""LoRAConfig, what a user asks for; OpSpec, what one call of the op needs to know. Both frozen and validated."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

__all__ = ["LoRAConfig", "OpSpec"]

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")
ENCODERS = ("vision", "text")
LAYERS = ("all", "half-up", "half-bottom", "up", "mid", "bottom", "top3")
SCALINGS = ("alpha/sqrt(r)", "alpha/r")
BACKENDS = ("triton", "eager", "reference")
MAX_RANK = 128


def _choices(name: str, value: Any, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """A string or a sequence of strings as a tuple in the order of `allowed`, each checked, none twice."""
    given = (value,) if isinstance(value, str) else tuple(value)
    unknown = [v for v in given if v not in allowed]
    if unknown or not given:
        what = f"unknown {name} {unknown[0]!r}" if unknown else f"{name} is empty"
        raise ValueError(f"{what}: choose from {', '.join(allowed)}")
    return tuple(v for v in allowed if v in given)


def _fits(key: str | int, path: str, block: int) -> bool:
    """Whether a key of rank_pattern means the module at `path` in a tower's `block`."""
    return key == block if isinstance(key, int) else fnmatch.fnmatchcase(path, key)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """How a model is adapted. The defaults are the recipe of CLIP-LoRA (Zanella & Ben Ayed, arXiv 2405.18541).

    Args:
        rank: R, the rank of each update, 1 to 128.
        alpha: numerator of the scaling.
        dropout: probability of dropping an input of the LoRA branch, in [0, 1), rounded to 1/256ths.
        targets: which projections are adapted, of q, k, v, o, fc1, fc2.
        encoders: which towers, of vision, text.
        layers: "all", "half-up", "half-bottom", "up", "mid", "bottom", "top3", or block indices; in each tower.
        modules: name patterns of modules of any torch model, instead of `encoders` and `layers` of a known one ("*" matches
            dots too): a matching nn.Linear is adapted as one weight, with `:qkv` after the pattern as q, k, v packed in its
            rows; of a matching nn.MultiheadAttention and of such a Linear `targets` says which of q, k, v and o.
        scaling: "alpha/sqrt(r)" as in the paper, or "alpha/r".
        rank_pattern: other ranks for some modules: {block number in each tower, or pattern of a module's path: rank}, the first
            that fits counts, 0 for no adapter: {0: 0, 11: 8, "visual.*": 4}. Each scales by its own rank.
        backend: "triton", "eager", "reference", or None for the best one at each call. Only with None is a Triton kernel
            compared with eager before it is trusted.

    Raises:
        ValueError: a value outside its range, with the range.
    """

    rank: int = 2
    alpha: float = 1.0
    dropout: float = 0.25
    targets: tuple[str, ...] = ("q", "k", "v")
    encoders: tuple[str, ...] = ENCODERS
    layers: str | tuple[int, ...] = "all"
    modules: tuple[str, ...] = ()
    scaling: str = "alpha/sqrt(r)"
    rank_pattern: Mapping[Any, int] | tuple[tuple[str | int, int], ...] = ()
    backend: Literal["triton", "eager", "reference"] | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def whole(value: Any, least: int, most: float = math.inf) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        if not whole(self.rank, 1, MAX_RANK):
            raise ValueError(f"rank must be a whole number from 1 to {MAX_RANK}, got {self.rank!r}")
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            raise ValueError(f"alpha must be a positive number, got {self.alpha}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.scaling not in SCALINGS:
            raise ValueError(f"unknown scaling {self.scaling!r}: choose from {', '.join(SCALINGS)}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}: choose from {', '.join(BACKENDS)}")
        put("targets", _choices("target", self.targets, TARGETS))
        put("encoders", _choices("encoder", self.encoders, ENCODERS))
        put("modules", (self.modules,) if isinstance(self.modules, str) else tuple(self.modules))
        if not all(isinstance(pattern, str) and pattern for pattern in self.modules):
            raise ValueError(f"modules must be name patterns, got {self.modules!r}")
        if self.modules and (self.encoders != ENCODERS or self.layers != "all"):
            raise ValueError("modules chooses by name: encoders and layers have no say beside it, leave them out")
        if isinstance(self.layers, str):
            if self.layers not in LAYERS:
                raise ValueError(f"unknown layers {self.layers!r}: choose from {', '.join(LAYERS)}, or block indices")
        else:
            indices = tuple(sorted(set(self.layers)))
            if not indices or not all(isinstance(i, int) and i >= 0 for i in indices):
                raise ValueError(f"layers must be block indices of 0 or more, got {self.layers!r}")
            put("layers", indices)
        pairs = self.rank_pattern.items() if isinstance(self.rank_pattern, Mapping) else self.rank_pattern
        pattern = tuple((key, rank) for key, rank in pairs)
        put("rank_pattern", pattern)
        for key, rank in pattern:
            if not (isinstance(key, str) or whole(key, 0)) or not whole(rank, 0, MAX_RANK):
                raise ValueError(
                    f"rank_pattern maps block numbers or patterns of module paths to ranks from 0 to {MAX_RANK},"
                    f" got {key!r}: {rank!r}"
                )

    @property
    def scale(self) -> float:
        """The factor before B(Ax)."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "alpha/sqrt(r)" else self.rank)

    def at(self, path: str, block: int) -> LoRAConfig | None:
        """The config of the module at `path` in a tower's block, with its own rank; None where rank_pattern leaves it out."""
        for key, rank in dict(self.rank_pattern).items():
            if _fits(key, path, block):
                return dataclasses.replace(self, rank=rank, rank_pattern=()) if rank else None
        return self

    def unused_patterns(self, modules: Iterable[tuple[str, int]]) -> list[str | int]:
        """The keys of rank_pattern that fit none of `modules`, (path, block) each: misspelt, most likely."""
        places = list(modules)
        return [key for key in dict(self.rank_pattern) if not any(_fits(key, *place) for place in places)]

    def layer_indices(self, depth: int) -> tuple[int, ...]:
        """The adapted blocks of a tower of `depth` blocks.

        Halves and thirds as in the paper's code (of 12: half-up 6-11, half-bottom 0-5, bottom 0-3, mid 4-7, up 8-11, top3
        9-11), carried over to any depth.

        Raises:
            ValueError: an index beyond the tower's depth.
        """
        if not isinstance(self.layers, str):
            if self.layers[-1] >= depth:
                raise ValueError(f"layers names block {self.layers[-1]}, but the tower has blocks 0 to {depth - 1}")
            return self.layers
        first, last = {
            "all": (0, depth),
            "half-up": (depth // 2, depth),
            "half-bottom": (0, depth // 2),
            "bottom": (0, depth // 3),
            "mid": (depth // 3, depth - depth // 3),
            "up": (depth - depth // 3, depth),
            "top3": (max(0, depth - 3), depth),
        }[self.layers]
        return tuple(range(first, last))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json and to the metadata of an adapter."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRAConfig:
        """The config that `to_dict` wrote (lists as JSON gives them are accepted).

        Raises:
            ValueError: a key that LoRAConfig does not have, or a value outside its range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict):
            raise TypeError(f"a config is a dictionary of options, got {type(values).__name__}")
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown LoRA option {unknown[0]!r}: known are {', '.join(sorted(known))}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """The constants of one call of the op; what a kernel is specialised on.

    Args:
        scale: the factor before B(Ax).
        dropout: probability of dropping, as asked for; 0.0 when not training.
        site: which layer this is; keys the mask only.
        groups: the original group of each of the G groups given, e.g. (0, 1, 2) for packed q, k, v; keys the mask only.
        active: for each of the G groups whether it has an adapter.
    """

    scale: float
    dropout: float = 0.0
    site: int = 0
    groups: tuple[int, ...] = (0,)
    active: tuple[bool, ...] = (True,)

    @property
    def active_groups(self) -> tuple[int, ...]:
        """The original group of each that has an adapter."""
        return tuple(group for group, active in zip(self.groups, self.active, strict=True) if active)

    def spans(self, n: int) -> list[tuple[int, slice]]:
        """For each active group its original group and its columns of y (M, n)."""
        width = n // len(self.active)
        return [
            (group, slice(i * width, (i + 1) * width))
            for i, (group, active) in enumerate(zip(self.groups, self.active, strict=True))
            if active
        ]
