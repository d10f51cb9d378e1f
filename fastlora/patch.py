"""The verbs on a model: patch, unpatch, merge, unmerge, lora_parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import hosts
from .config import LoRAConfig
from .layers import LoRALayer, adopt, refusal, release

__all__ = ["PatchReport", "config_of", "lora_layers", "lora_parameters", "merge", "patch", "unmerge", "unpatch"]

_RECORD = "_fastlora"


@dataclasses.dataclass(frozen=True)
class PatchReport:
    """What `patch` did.

    Args:
        config: what was asked for.
        patched: paths of the modules that have an adapter now.
        skipped: path of a tower or module -> why it was left alone.
        trainable, total: numbers of parameters.
    """

    config: LoRAConfig
    patched: tuple[str, ...]
    skipped: dict[str, str]
    trainable: int
    total: int

    def __str__(self) -> str:
        share = 100 * self.trainable / self.total
        own = " or its own" if self.config.rank_pattern else ""
        lines = [
            f"{len(self.patched)} modules adapted, rank {self.config.rank}{own}: {self.trainable:,} trainable parameters of"
            f" {self.total:,} ({share:.2f} %)"
        ]
        return "\n".join(lines + [f"not adapted: {path}: {why}" for path, why in self.skipped.items()])


@dataclasses.dataclass
class _Record:
    """What `unpatch` needs to put the model back."""

    config: LoRAConfig
    originals: dict[str, nn.Module]
    frozen: list[str]
    skipped: dict[str, str]


def patch(model: nn.Module, config: LoRAConfig | None = None, /, **options: Any) -> PatchReport:
    """Give `model` LoRA adapters and freeze everything else.

    The attention modules of the chosen blocks are replaced by drop-ins that share their parameters: outputs do not change
    until training does (B starts at zero), state_dict keeps every key of the host, `unpatch` puts everything back. Patching
    again with the same config changes nothing.

    Args:
        model: a CLIP of open_clip, OpenAI or transformers, one of its towers, a timm vision transformer; or with
            `modules=(pattern, ...)` any torch model. docs/hosts.md lists what was tried.
        config: a LoRAConfig; or give its fields as keywords: `patch(model, rank=4, targets=("q", "v"))`.

    Returns:
        What was patched and what was not, and why.

    Raises:
        TypeError: a model of no known family.
        ValueError: a bad option, a rank above the width, nothing left to adapt, or another config on a patched model.
    """
    if config is not None and options:
        raise ValueError("give patch a LoRAConfig or its fields as keywords, not both")
    config = config or LoRAConfig(**options)
    if (record := _record(model)) is not None:
        if record.config != config:
            raise ValueError(f"the model is patched with {record.config}; call fastlora.unpatch(model) first")
        return _report(model, record)

    sites, skipped = _sites(model, config)
    if not sites:
        why = (
            "; ".join(f"{path}: {why}" for path, why in skipped.items())
            or "rank_pattern gives every module rank 0, or targets names none of what was chosen"
        )
        raise ValueError(f"nothing to adapt: {why}")
    # all drop-ins are made before one is put in place: an error leaves the model as it was
    layers = {path: adopt(model.get_submodule(path), **vars(site)) for path, site in sites.items()}
    record = _Record(config, {path: model.get_submodule(path) for path in layers}, [], skipped)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            record.frozen.append(name)
            parameter.requires_grad_(False)
    for path, layer in sorted(layers.items()):  # an attention before the out_proj inside it
        _replace(model, path, layer)
    setattr(model, _RECORD, record)
    return _report(model, record)


def unpatch(model: nn.Module) -> None:
    """Put back the model's own modules and requires_grad flags; merged weights are unmerged first. Adapters are dropped.

    Raises:
        ValueError: the model is not patched.
    """
    record = _patched(model)
    unmerge(model)
    for path, host in sorted(record.originals.items(), reverse=True):
        release(_layer(model, path), host)
        _replace(model, path, host)
    parameters = dict(model.named_parameters())
    for name in record.frozen:
        parameters[name].requires_grad_(True)
    delattr(model, _RECORD)


def merge(model: nn.Module) -> None:
    """Add every adapter's update to its base weight (summed in fp32, rounded once to the weight's dtype).

    Inference then costs what the plain model costs. The weights as they were are kept, and `unmerge` restores them exactly.

    Raises:
        ValueError: the model is not patched.
    """
    _patched(model)
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Restore the base weights bit for bit.

    Raises:
        ValueError: the model is not patched.
    """
    _patched(model)
    for _, layer in lora_layers(model):
        layer.unmerge()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayer]]:
    """Path and module of every adapter, text tower first."""
    for path in _patched(model).originals:
        yield path, _layer(model, path)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters, lora_A and lora_B of every adapter: what an optimizer takes.

    Raises:
        ValueError: the model is not patched.
    """
    return [parameter for _, layer in lora_layers(model) if layer.adapted for parameter in layer.adapters()]


def config_of(model: nn.Module) -> LoRAConfig | None:
    """The config that `model` is patched with, or None."""
    record = _record(model)
    return None if record is None else record.config


@dataclasses.dataclass(frozen=True)
class _Adoption:
    """What `adopt` takes beside the module; the config has the rank of this one."""

    config: LoRAConfig
    site: int
    active: tuple[bool, ...]
    weights: tuple[str, ...]


def _sites(model: nn.Module, config: LoRAConfig) -> tuple[dict[str, _Adoption], dict[str, str]]:
    """Path -> what is wanted of every module to adapt; path -> reason of what is left alone."""
    sites: dict[str, _Adoption] = {}
    chosen: list[tuple[str, int]] = []
    groups, skipped = _groups(model, config)
    seen: dict[int, str] = {}
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
            why = refusal(module, site.weights) if first == site.path else f"it is the same module as {first}"
            if why is not None:
                skipped[site.path] = why
                continue
            active = tuple(own[site.path] is not None and t in config.targets for t in site.targets) or (True,)
            sites[site.path] = _Adoption(own[site.path] or config, number, active, site.weights)
    if unused := config.unused_patterns(chosen):
        raise ValueError(f"rank_pattern has {unused[0]!r}, which fits no module that the other options choose")
    return sites, skipped


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


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    parent._modules[name] = module


def _layer(model: nn.Module, path: str) -> LoRALayer:
    layer = model.get_submodule(path)
    if not isinstance(layer, LoRALayer):
        raise ValueError(f"{path} has lost its adapter: the module there was replaced after fastlora.patch")
    return layer


def _record(model: nn.Module) -> _Record | None:
    return getattr(model, _RECORD, None)


def _patched(model: nn.Module) -> _Record:
    if (record := _record(model)) is None:
        raise ValueError("the model is not patched: call fastlora.patch(model) first")
    return record


def _report(model: nn.Module, record: _Record) -> PatchReport:
    trainable = sum(p.numel() for p in lora_parameters(model))
    total = sum(p.numel() for p in model.parameters())
    patched = tuple(path for path, layer in lora_layers(model) if layer.adapted)
    return PatchReport(record.config, patched, record.skipped, trainable, total)
