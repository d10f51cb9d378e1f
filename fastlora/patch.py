"""The verbs on a model: patch and add_adapter, unpatch, merge, unmerge."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import nn

from . import hosts
from .adapters import set_adapter
from .config import LoRAConfig
from .layers import DEFAULT, adopt, refusal, release, tied
from .record import (
    RECORD,
    MergeReport,
    PatchReport,
    Record,
    check_not_merged,
    layer_at,
    lora_layers,
    merge_report_of,
    patched,
    record_of,
    report_of,
)

__all__ = ["add_adapter", "merge", "patch", "unmerge", "unpatch"]


def patch(model: nn.Module, config: LoRAConfig | None = None, /, **options: Any) -> PatchReport:
    """Give `model` LoRA adapters and freeze everything else.

    The attention modules of the chosen blocks are replaced by drop-ins that share their parameters: outputs do not change
    until training does (B starts at zero), state_dict keeps every key of the host, `unpatch` puts everything back. Patching
    again with the same config changes nothing; `fastlora.add_adapter` puts a second adapter on the model.

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
    config = _config(config, options)
    if (record := record_of(model)) is None:
        return add_adapter(model, DEFAULT, config)
    if record.configs.get(record.active or "") != config:
        raise ValueError(f"the model is patched with {record.configs}; call fastlora.unpatch(model) first")
    return report_of(model)


def add_adapter(model: nn.Module, name: str, config: LoRAConfig | None = None, /, **options: Any) -> PatchReport:
    """Give `model` one more adapter, and make it the active one: the one that computes and that is trained.

    A model that is not patched becomes so. Adapters may differ in everything: rank, targets, layers, encoders. Arguments,
    results and errors as for `patch`.

    Args:
        name: of letters, digits, "-" and "_"; what `patch` and `load` make is called "default". The adapter's parameters are
            `<module path>.named.<name>.lora_A` and `.lora_B` in state_dict.

    Raises:
        ValueError: also where there is an adapter of this name, or the active one is merged.
    """
    config, record = _config(config, options), record_of(model) or Record()
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"the name of an adapter has letters, digits, - and _, got {name!r}")
    if name in record.configs:
        raise ValueError(f"the model has an adapter called {name!r}: delete it first, or choose another name")
    check_not_merged(model, record)
    sites, skipped = _sites(model, config, record.originals)
    if not sites:
        why = (
            "; ".join(f"{path}: {why}" for path, why in skipped.items())
            or "rank_pattern gives every module rank 0, or targets names none of what was chosen"
        )
        raise ValueError(f"nothing to adapt: {why}")
    # all that can fail comes before anything is put in place: an error leaves the model as it was
    there = {path: site for path, site in sites.items() if path in record.originals}
    for path, site in there.items():
        layer_at(model, path).check_rank(site.config.rank)
    new = {path: adopt(model.get_submodule(path), name=name, **vars(site)) for path, site in sites.items() if path not in there}
    for path, site in there.items():
        layer_at(model, path).add(name, site.config, site.active)
    if not record.originals:
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                record.frozen.append(key)
                parameter.requires_grad_(False)
    record.originals |= {path: model.get_submodule(path) for path in new}
    for path, layer in sorted(new.items()):  # an attention before the out_proj inside it
        _replace(model, path, layer)
    # one order whatever was added first: optimizers know parameters by their place
    record.originals = dict(sorted(record.originals.items(), key=lambda item: layer_at(model, item[0]).spec.site))
    record.configs[name], record.skipped[name] = config, skipped
    setattr(model, RECORD, record)
    set_adapter(model, name)
    return report_of(model)


def unpatch(model: nn.Module) -> None:
    """Put back the model's own modules and requires_grad flags; merged weights are unmerged first. Adapters are dropped.

    Raises:
        ValueError: the model is not patched.
    """
    record = patched(model)
    unmerge(model)
    layers = dict(lora_layers(model))
    for path, host in sorted(record.originals.items()):  # an attention before the out_proj inside it, which is then put there
        release(layers[path], host)
        _replace(model, path, host)
    parameters = dict(model.named_parameters())
    for name in record.frozen:
        parameters[name].requires_grad_(True)
    delattr(model, RECORD)


def merge(model: nn.Module) -> MergeReport:
    """Add the active adapter's update to its base weights (summed in fp32, rounded once to the weight's dtype).

    Inference then costs what the plain model costs. The weights as they were are kept, and `unmerge` restores them exactly.

    Returns:
        What rounding to a half-precision weight cost, to print or to read.

    Raises:
        ValueError: the model is not patched.
    """
    for _, layer in lora_layers(model):
        layer.merge()
    return merge_report_of(model)


def unmerge(model: nn.Module) -> None:
    """Restore the base weights bit for bit.

    Raises:
        ValueError: the model is not patched.
    """
    patched(model)
    for _, layer in lora_layers(model):
        layer.unmerge()


@dataclasses.dataclass(frozen=True)
class _Adoption:
    """What `adopt` takes beside the module; the config has the rank of this one."""

    config: LoRAConfig
    site: int
    active: tuple[bool, ...]
    weights: tuple[str, ...]


def _sites(
    model: nn.Module, config: LoRAConfig, originals: dict[str, nn.Module]
) -> tuple[dict[str, _Adoption], dict[str, str]]:
    """Path -> what is wanted of every module to adapt; path -> reason of what is left alone."""
    sites: dict[str, _Adoption] = {}
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


def _config(config: LoRAConfig | None, options: dict[str, Any]) -> LoRAConfig:
    if config is not None and options:
        raise ValueError("give a LoRAConfig or its fields as keywords, not both")
    return config or LoRAConfig(**options)
