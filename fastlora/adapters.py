"""Several adapters on one model, by name: which one computes, none for a while, none for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .beside import Kept, misfits, swap
from .layers import LoRALayer
from .record import Record, check_not_merged, lora_layers, patched

__all__ = ["bring", "check_places", "delete_adapter", "disabled", "lora_parameters", "set_adapter", "using"]


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter called `name` the active one; with None there is none, and the model is the plain one.

    The active adapter computes, is trained, merged and saved; the parameters of the others require no gradient. What
    `fastlora.load` brought beside an adapter (a head, say) comes and goes with it; what was trained beside adapters on this
    model is the model's own and stays for all of them.

    Raises:
        ValueError: the model is not patched, it has no such adapter, the active one is merged, or a module that an adapter
            brought values for was replaced.
    """
    record = patched(model)
    if name is not None and name not in record.configs:
        raise ValueError(f"no adapter is called {name!r}: there are {', '.join(record.configs)}")
    layers = [layer for _, layer in lora_layers(model)]
    if name != record.active:
        check_not_merged(model, record)
        check_places(model)
        _compute_with(model, record, layers, name)
    for layer in layers:
        layer.activate(name)
        for other in layer.names():
            for parameter in layer.adapters_of(other):
                parameter.requires_grad_(other == name)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Drop an adapter and its parameters. After the active one there is none active, until `set_adapter` chooses another.

    Raises:
        ValueError: the model is not patched, it has no such adapter, or it is merged.
    """
    record = patched(model)
    if name not in record.configs:
        raise ValueError(f"no adapter is called {name!r}: there are {', '.join(record.configs)}")
    if name == record.active:
        set_adapter(model, None)
    for _, layer in lora_layers(model):
        layer.remove(name)
    del record.configs[name], record.skipped[name]
    record.brought.pop(name, None)
    left = {key for adapter, brought in record.brought.items() if adapter is not None for key in brought}
    record.brought[None] = {key: kept for key, kept in record.brought.get(None, {}).items() if key in left}


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within: no adapter computes, so that the patched model gives the plain one's features (zero-shot, a teacher's logits).

    What is merged is unmerged, and what `fastlora.load` brought beside the adapter is taken out, for that long. What is trained
    beside it on this model stays. Nothing else changes: parameters, their gradients, which adapter is active after.

    Raises:
        ValueError: the model is not patched.
    """
    with using(model, None):
        yield


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within: the adapter called `name` computes instead of the active one, with what it brought; none for None.

    requires_grad of the adapters stays as it is.
    """
    record, layers = patched(model), [layer for _, layer in lora_layers(model)]
    if name == record.active:
        yield
        return
    check_places(model)
    merged, before = [layer for layer in layers if layer.merged], record.active
    for layer in merged:
        layer.unmerge()
    try:
        _compute_with(model, record, layers, name)
        yield
    finally:
        _compute_with(model, record, layers, before)
        for layer in merged:
            layer.merge()


def bring(model: nn.Module, name: str, beside: dict[str, Kept]) -> None:
    """Let the active adapter, called `name`, bring `beside` in the place of whatever it brought before."""
    brought = patched(model).brought
    swap(model, brought, name, None)
    brought[name] = beside
    swap(model, brought, None, name)


def check_places(model: nn.Module) -> None:
    """Raise ValueError where a module was replaced that an adapter brought values for."""
    if lost := misfits(model, patched(model).brought):
        raise ValueError(f"{lost[0]} was loaded with an adapter, and its module was replaced since: put that module back")


def _compute_with(model: nn.Module, record: Record, layers: list[LoRALayer], name: str | None) -> None:
    swap(model, record.brought, record.active, name)
    record.active = name
    for layer in layers:
        layer.activate(name)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every module that the active adapter is on: what an optimizer takes.

    Raises:
        ValueError: the model is not patched.
    """
    return [parameter for _, layer in lora_layers(model) if layer.adapted for parameter in layer.adapters()]
