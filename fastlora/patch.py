"""The verbs on a model: patch and add_adapter, unpatch, merge, unmerge."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import check_places, set_adapter
from .beside import host_state, mark, misfits, swap
from .config import LoRAConfig
from .layers import DEFAULT, LoRALayer, adopt, release
from .layers.packing import unpack
from .plan import Plan, plan
from .record import (
    RECORD,
    MergeReport,
    PatchReport,
    Record,
    check_not_merged,
    layer_at,
    lora_layers,
    merge_report_of,
    originals,
    parameters_of,
    patched,
    record_of,
    report_of,
)

__all__ = ["add_adapter", "check_new", "install", "merge", "patch", "unmerge", "unpatch"]


def patch(model: nn.Module, config: LoRAConfig | None = None, /, **options: Any) -> PatchReport:
    """Give `model` LoRA adapters and freeze everything else.

    The attention modules of the chosen blocks are replaced by drop-ins that share their parameters: outputs do not change
    until training does (B starts at zero), state_dict keeps every key of the host, `unpatch` puts everything back. Patching
    again with the same config changes nothing; `fastlora.add_adapter` puts a second adapter on the model. Adapters are float32
    whatever the model's dtype and torch's default; `model.half()` and the like cast them with all other parameters.

    To train a head, logit_scale or any other parameter beside the adapters, set requires_grad on it afterwards and give it to
    the optimizer: `fastlora.save` writes it too. A new module in the place of an old one is trained and saved as it comes.

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
    check_new(model, name)
    return install(model, name, plan(model, _config(config, options), originals(model)))


def check_new(model: nn.Module, name: str) -> None:
    """Raise ValueError where `model` can have no new adapter of this name."""
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"the name of an adapter has letters, digits, - and _, got {name!r}")
    if (record := record_of(model)) is None:
        return
    if name in record.configs:
        raise ValueError(f"the model has an adapter called {name!r}: delete it first, or choose another name")
    check_not_merged(model, record)
    check_places(model)


def install(model: nn.Module, name: str, plan: Plan, values: dict[str, Tensor] | None = None) -> PatchReport:
    """Put a new adapter in place as planned, and make it the active one. After an error the model is as it was.

    Args:
        values: the adapter's parameters by the names in `plan.shapes`, on their devices; default: drawn, with B zero.

    Raises:
        ValueError: a rank above the width.
    """
    record = record_of(model) or Record()
    first = not record.originals
    marks = {key: mark(tensor) for key, tensor in host_state(model).items()} if first else record.marks
    new = _prepare(model, name, plan, record, values)  # the last that can fail: from here on the model is touched
    if first:
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                record.frozen.append(key)
                parameter.requires_grad_(False)
        record.marks = marks
    record.originals |= {path: model.get_submodule(path) for path in new}
    for path, layer in sorted(new.items()):  # an attention before the out_proj inside it
        _replace(model, path, layer)
    # one order whatever was added first: optimizers know parameters by their place
    record.originals = dict(sorted(record.originals.items(), key=lambda item: layer_at(model, item[0]).spec.site))
    record.configs[name], record.skipped[name] = plan.config, plan.skipped
    setattr(model, RECORD, record)
    set_adapter(model, name)
    return report_of(model)


def _prepare(model: nn.Module, name: str, plan: Plan, record: Record, values: dict[str, Tensor] | None) -> dict[str, LoRALayer]:
    """Drop-ins, by path, for the modules that have none; those that are there get the adapter, inactive. Undone after an error.

    Arguments and errors as for `install`.
    """
    there = {path: layer_at(model, path) for path in plan.modules if path in record.originals}
    for path, layer in there.items():
        layer.check_rank(plan.modules[path].config.rank)
    new: dict[str, LoRALayer] = {}
    try:
        # values stand in for what is drawn: then drawing must not move the caller's generator
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=values is not None):
            for path, module in plan.modules.items():
                if path in there:
                    there[path].add(name, module.config, module.active)
                    continue
                new[path] = adopt(
                    model.get_submodule(path), module.config, site=module.site, active=module.active,
                    weights=module.weights, name=name,
                )  # fmt: skip
        if values is not None:
            with torch.no_grad():
                for key, parameter in parameters_of(there | new, name).items():
                    parameter.copy_(values[key])
    except BaseException:
        for layer in there.values():
            layer.remove(name)
        for path, module in plan.modules.items():
            if path not in there:
                _unpack(model.get_submodule(path), module.weights)
        raise
    return new


def unpatch(model: nn.Module) -> None:
    """Put back the model's own modules and requires_grad flags; merged weights are unmerged first. Adapters are dropped.

    What `fastlora.load` put in place beside an adapter gives way to what stood there before. What was trained beside one on
    this model keeps the values it has: no copy was made of what training overwrote.

    Raises:
        ValueError: the model is not patched.
    """
    record, layers = patched(model), dict(lora_layers(model))
    unmerge(model)
    for name in misfits(model, record.brought):  # replaced since, by the user
        for brought in record.brought.values():
            brought.pop(name, None)
    swap(model, record.brought, record.active, None)
    for path, host in sorted(record.originals.items()):  # an attention before the out_proj inside it, which is then put there
        release(layers[path], host)
        _replace(model, path, host)
    parameters = dict(model.named_parameters())
    for name in record.frozen:
        if name in parameters:  # else it was replaced since
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
    layers = [layer for _, layer in lora_layers(model) if not layer.merged]
    try:
        for layer in layers:
            layer.merge()
    except BaseException:
        for layer in layers:
            layer.unmerge()
        raise
    return merge_report_of(model)


def unmerge(model: nn.Module) -> None:
    """Restore the base weights bit for bit.

    Raises:
        ValueError: the model is not patched.
    """
    for layer in dict(lora_layers(model)).values():
        layer.unmerge()


def _unpack(host: nn.Module, weights: tuple[str, ...]) -> None:
    """Give a host's q, k and v memory of their own again, which `adopt` packs."""
    own = dict(host.named_parameters())
    for names in (weights, [f"{name.removesuffix('weight')}bias" for name in weights]):
        unpack([own[name] for name in names if name in own])


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    parent = model.get_submodule(owner)
    parent._modules[name] = module


def _config(config: LoRAConfig | None, options: dict[str, Any]) -> LoRAConfig:
    if config is not None and options:
        raise ValueError("give a LoRAConfig or its fields as keywords, not both")
    return config or LoRAConfig(**options)
