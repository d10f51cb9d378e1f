"""What a patched model remembers: its adapters by name, the modules they took the place of, and how to reach them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import nn

from .beside import Kept, Mark
from .config import LoRAConfig
from .layers import LoRALayer

__all__ = [
    "RECORD",
    "MergeReport",
    "PatchReport",
    "Record",
    "check_not_merged",
    "config_of",
    "layer_at",
    "lora_layers",
    "merge_report_of",
    "originals",
    "parameters_of",
    "patched",
    "record_of",
    "report_of",
]

RECORD = "_fastlora"


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    Args:
        config: what was asked for.
        patched: paths of the modules that have an adapter now.
        skipped: path of a tower or module -> why it was left alone.
        frozen: what required a gradient before and was frozen: paths of modules that were frozen whole, else of parameters.
        trainable, total: numbers of parameters; trainable are the adapter's.
    """

    config: LoRAConfig
    patched: tuple[str, ...]
    skipped: dict[str, str]
    frozen: tuple[str, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        own = " or its own" if self.config.rank_pattern else ""
        lines = [
            f"{len(self.patched)} modules adapted, rank {self.config.rank}{own}: {self.trainable:,} trainable parameters of"
            f" {self.total:,} ({share:.2f} %)"
        ]
        # an adapted weight gets no gradient of its own, and a block's parts are too many to name
        heads = [path for path in self.frozen if path.rpartition(".")[0] not in self.patched and not _in_block(path)]
        if heads := sorted(heads, key=_how_seldom_trained):
            named = ", ".join(heads[:4]) + (", …" if len(heads) > 4 else "")
            lines.append(f"frozen: {named} (to train one too, set requires_grad on it after patch; save keeps it)")
        return "\n".join(lines + [f"not adapted: {path}: {why}" for path, why in self.skipped.items()])


def _in_block(path: str) -> bool:
    """Whether a path lies in one of many blocks, which have numbers."""
    return any(name.isdigit() for name in path.split("."))


def _how_seldom_trained(path: str) -> int:
    """A sort key: heads and what has a name of the user's own, then temperatures, norms, and what lies before the blocks."""
    name = path.rpartition(".")[2].lower()
    order = ("logit", "norm|ln", "embed|token|pos|conv|^pre_|_pre$|mask")
    return max((rank for rank, pattern in enumerate(order, 1) if re.search(pattern, name)), default=0)


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging did, and what rounding to the weights' dtype cost.

    Args:
        modules: how many weights hold the adapter's update.
        dtype: what they are stored in.
        largest: the largest error of a merged weight against its sum in fp32.
        relative: norm of all those errors over the norm of the update.
    """

    modules: int
    dtype: torch.dtype
    largest: float
    relative: float

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        cost = f"rounding to {kind} costs {self.largest:.1e} at most, {100 * self.relative:.2g} % of the update"
        return f"{self.modules} modules merged, summed in fp32; {cost if self.largest else f'stored in {kind}: no rounding'}"


@dataclasses.dataclass
class Record:
    """What `unpatch` needs to put the model back.

    Args:
        configs, skipped: of each adapter, by its name.
        active: the name of the adapter that computes.
        originals: path of each adapted module -> the host's own.
        frozen: parameters that required a gradient.
        marks: by what each of the host's parameters and buffers is known to be as it was when it was frozen.
        brought: adapter -> what `load` put in place beside it; below None what stood there before.
    """

    configs: dict[str, LoRAConfig] = dataclasses.field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    active: str | None = None
    originals: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    frozen: list[str] = dataclasses.field(default_factory=list)
    marks: dict[str, Mark | None] = dataclasses.field(default_factory=dict)
    brought: dict[str | None, dict[str, Kept]] = dataclasses.field(default_factory=dict)


def config_of(model: nn.Module) -> LoRAConfig | None:
    """The config of the active adapter, or None."""
    record = record_of(model)
    return None if record is None or record.active is None else record.configs[record.active]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and module of every adapter, text tower first."""
    for path in patched(model).originals:
        yield path, layer_at(model, path)


def layer_at(model: nn.Module, path: str) -> LoRALayer:
    """The adapted module at `path`; ValueError where something else stands there now."""
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALayer):
        raise ValueError(f"{path} has lost its adapter: the module there was replaced after fastlora.patch")
    return layer


def originals(model: nn.Module) -> dict[str, nn.Module]:
    """Path of each adapted module -> the host's own; of a model that is not patched none."""
    record = record_of(model)
    return {} if record is None else record.originals


def parameters_of(layers: dict[str, LoRALayer], adapter: str) -> dict[str, nn.Parameter]:
    """lora_A and lora_B of one adapter on layers by path, under the names they have in a file."""
    return {
        f"{path}.{name}": parameter
        for path, layer in layers.items()
        if adapter in layer.names()
        for name, parameter in zip(("lora_A", "lora_B"), layer.adapters_of(adapter), strict=True)
    }


def record_of(model: nn.Module) -> Record | None:
    """What a patched model remembers, or None."""
    return getattr(model, RECORD, None)


def patched(model: nn.Module) -> Record:
    """As `record_of`; ValueError for a model that is not patched."""
    if (record := record_of(model)) is None:
        raise ValueError("the model is not patched: call fastlora.patch(model) first")
    return record


def check_not_merged(model: nn.Module, record: Record) -> None:
    """Raise ValueError where the active adapter is merged."""
    if any(layer_at(model, path).merged for path in record.originals):
        raise ValueError("the active adapter is merged into the weights: call fastlora.unmerge(model) first")


def report_of(model: nn.Module) -> PatchReport:
    """What the active adapter is on."""
    record = patched(model)
    assert record.active is not None
    layers = {path: layer for path, layer in lora_layers(model) if layer.adapted}
    trainable = sum(parameter.numel() for layer in layers.values() for parameter in layer.adapters())
    total = sum(parameter.numel() for parameter in model.parameters())
    config, skipped = record.configs[record.active], record.skipped[record.active]
    return PatchReport(config, tuple(layers), skipped, _collapsed(model, set(record.frozen)), trainable, total)


def _collapsed(model: nn.Module, names: set[str]) -> tuple[str, ...]:
    """Parameters by name, those of a module that holds no others as one: the module's path."""
    held = {path: {n for n, _ in module.named_parameters(path)} for path, module in model.named_modules() if path}
    full = {path for path, own in held.items() if own and own <= names}
    outer = {path for path in full if path.rpartition(".")[0] not in full}
    covered = set().union(*(held[path] for path in outer))
    return tuple(sorted(outer | (names - covered)))


def merge_report_of(model: nn.Module, dtype: torch.dtype | None = None) -> MergeReport:
    """What the active adapter's merged weights lose in `dtype`, by default the weights' own."""
    layers = [layer for _, layer in lora_layers(model) if layer.adapted]
    costs = [layer.rounding(dtype) for layer in layers]
    error, update = (sum(cost[i] ** 2 for cost in costs) ** 0.5 for i in (1, 2))
    stored = dtype or (layers[0].base_weights()[0].dtype if layers else torch.float32)
    return MergeReport(len(layers), stored, max((cost[0] for cost in costs), default=0.0), error / update if update else 0.0)
