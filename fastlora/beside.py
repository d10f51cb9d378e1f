"""What is trained beside the adapters: a head, logit_scale, norms. How it is told from what stayed frozen, and whose it is."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .layers import LoRALayer, LoRASlot

__all__ = ["Kept", "Mark", "host_state", "mark", "misfits", "sample", "swap", "trained", "whole"]

_SAMPLES = 16
# What averaging fp32 weights with themselves costs, and a cast to bfloat16.
_ROUNDINGS = (1e-5, 2**-8)
_SMALLEST = 2.0**-24  # what float16 tells apart near zero


@dataclasses.dataclass(frozen=True)
class Mark:
    """By what a tensor is known again: a few of its values, and the sum of all its bits."""

    values: Tensor
    bits: Tensor
    shape: torch.Size

    def fits(self, tensor: Tensor) -> bool:
        """Whether `tensor` has the values it had; once cast to another dtype, whether the few values are those, rounded."""
        if tensor.shape != self.shape:
            return False
        now = sample(tensor)
        then = self.values.to(now.device, now.dtype)
        if not ((now == then) | (now.isnan() & then.isnan())).all():
            return False
        return tensor.dtype != self.values.dtype or torch.equal(_bits(tensor), self.bits.to(now.device))

    def near(self, tensor: Tensor, tolerance: float) -> bool:
        """Whether the few values are those they were, but for a relative error of `tolerance`."""
        if tensor.shape != self.shape:
            return False
        now, then = sample(tensor).double(), self.values.to(tensor.device).double()
        return torch.allclose(now, then, rtol=tolerance, atol=_SMALLEST, equal_nan=True)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A value of a parameter or buffer while another one is in its place, and whether it requires a gradient."""

    value: Tensor
    trained: bool


def whole(tensor: Tensor) -> Tensor:
    """A plain tensor without gradient. One that is sharded over processes is gathered, for which all of them must call."""
    gather = getattr(tensor, "full_tensor", None)  # importing DTensor to ask for it takes half a second
    return (tensor if gather is None else gather()).detach()


def sample(tensor: Tensor) -> Tensor:
    """A copy of at most 16 values of a tensor, evenly spread."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].clone()


def mark(tensor: Tensor) -> Mark | None:
    """The mark of a tensor, or None where it holds no plain values to mark (on the meta device, quantised)."""
    tensor = whole(tensor)
    if type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return None
    return Mark(sample(tensor), _bits(tensor), tensor.shape)


def host_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer that is no adapter's, by its name in state_dict; tied ones by each of theirs."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoRASlot):
            continue
        prefix = f"{path}.".replace("_orig_mod.", "") if path else ""  # torch.compile's wrapper adds a name of its own
        own: dict[str, Any] = {k: t for k, t in module._buffers.items() if k not in module._non_persistent_buffers_set}
        own = {**module._parameters, **own}
        if isinstance(module, LoRALayer):
            own = {k: t for k, t in own.items() if k not in ("lora_A", "lora_B")}
        found |= {prefix + k: t for k, t in own.items() if t is not None}
    return found


def trained(model: nn.Module, marks: dict[str, Mark | None]) -> dict[str, Tensor]:
    """What an adapter needs beside itself, by name: the host's parameters that require a gradient, parameters and buffers that
    differ from their marks or have none, and the buffers of their modules. A merged weight is given as it was before.

    Where weights under the adapters differ from their marks by rounding (in an average of models, or cast to 16 bits and back),
    so may all others, and only what differs by more counts. Where they differ by more themselves, the base as a whole was
    replaced: then the marks say nothing, and only what requires a gradient, is new or has another shape is given.
    """
    state, bases = host_state(model), set()
    values = dict(state)
    names = {id(tensor): name for name, tensor in state.items()}
    for layer in model.modules():
        if not isinstance(layer, LoRALayer) or not layer.names():
            continue
        parts = layer.base_weights()
        bases |= {names[id(part)] for part in parts}
        if layer._frozen_weight is not None:
            rows = layer._frozen_weight.split([len(part) for part in parts])
            values |= {names[id(part)]: own for part, own in zip(parts, rows, strict=True)}
    new = {n for n, t in state.items() if n not in marks or ((known := marks[n]) is not None and known.shape != t.shape)}
    kept = {n: known for n, known in marks.items() if n in state and known is not None and not state[n].requires_grad}
    changed = {n for n, known in kept.items() if not known.fits(whole(values[n]))}
    for rounding in _ROUNDINGS:
        if changed & bases:
            changed = {n for n in changed if not kept[n].near(whole(values[n]), rounding)}
    chosen = new | (set() if changed & bases else changed) | {n for n, t in state.items() if t.requires_grad}
    owners = {n.rpartition(".")[0] for n in chosen}
    chosen |= {n for n, t in state.items() if not isinstance(t, nn.Parameter) and n.rpartition(".")[0] in owners}
    return {name: value for name, value in values.items() if name in chosen}


_Brought = dict[str | None, dict[str, Kept]]


def misfits(model: nn.Module, brought: _Brought) -> list[str]:
    """The names of what an adapter brought to a place that is no longer there, or has another shape."""
    state = host_state(model) if brought else {}
    return [
        name
        for name, kept in brought.get(None, {}).items()
        if (here := state.get(name)) is None or here.shape != kept.value.shape
    ]


def swap(model: nn.Module, brought: _Brought, old: str | None, new: str | None) -> None:
    """Take what the adapter `old` brought out of the model, and put in what `new` brings: values and requires_grad.

    The base's own values, below None in `brought`, stand where an adapter brings nothing. Tensors change places and nothing is
    copied, so that a backward pass under way still finds the values it saved.
    """
    if not brought.get(old) and not brought.get(new):
        return
    state = host_state(model)
    base = brought.setdefault(None, {})
    for name in {**brought.get(old, {}), **brought.get(new, {})}:
        before, after = (brought[a] if name in brought.get(a, {}) else base for a in (old, new))
        if before is after:
            continue
        here, coming = state[name], after[name]
        before[name] = Kept(here.data, here.requires_grad)
        here.data = coming.value.to(here.device, here.dtype)
        if isinstance(here, nn.Parameter):
            here.requires_grad_(coming.trained)


def _bits(tensor: Tensor) -> Tensor:
    """The sum of a tensor's memory as integers: the same in any order, so on any device and with any number of threads."""
    flat = tensor.contiguous().flatten()
    if flat.nbytes % 4 or flat.storage_offset() * flat.element_size() % 4:
        return flat.view(torch.uint8).sum(dtype=torch.int64)
    return flat.view(torch.uint8).view(torch.int32).sum(dtype=torch.int32)  # it wraps; in 64 bits it takes 30 times as long
