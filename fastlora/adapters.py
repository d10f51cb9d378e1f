"""Several adapters on one model, by name: which one computes, none for a while, none for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from .record import check_not_merged, lora_layers, patched

__all__ = ["delete_adapter", "disabled", "lora_parameters", "set_adapter", "using"]


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Make the adapter called `name` the active one; with None there is none, and the model is the plain one.

    The active adapter computes, is trained, merged and saved; the parameters of the others require no gradient.

    Raises:
        ValueError: the model is not patched, it has no such adapter, or the active one is merged.
    """
    record = patched(model)
    if name is not None and name not in record.configs:
        raise ValueError(f"no adapter is called {name!r}: there are {', '.join(record.configs)}")
    if name != record.active:
        check_not_merged(model, record)
    record.active = name
    for _, layer in lora_layers(model):
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


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within: no adapter computes, so that the patched model gives the plain one's features (zero-shot, a teacher's logits).

    What is merged is unmerged for that long. Nothing else changes: parameters, their gradients, which adapter is active after.

    Raises:
        ValueError: the model is not patched.
    """
    with using(model, None):
        yield


@contextlib.contextmanager
def using(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within: the adapter called `name` computes instead of the active one, none for None; requires_grad stays as it is."""
    record, layers = patched(model), [layer for _, layer in lora_layers(model)]
    if name == record.active:
        yield
        return
    merged, before = [layer for layer in layers if layer.merged], record.active
    for layer in merged:
        layer.unmerge()
    try:
        record.active = name
        for layer in layers:
            layer.activate(name)
        yield
    finally:
        record.active = before
        for layer in layers:
            layer.activate(before)
        for layer in merged:
            layer.merge()


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every module that the active adapter is on: what an optimizer takes.

    Raises:
        ValueError: the model is not patched.
    """
    return [parameter for _, layer in lora_layers(model) if layer.adapted for parameter in layer.adapters()]
