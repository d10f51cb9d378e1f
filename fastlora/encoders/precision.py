"""The frozen weights in the compute dtype, once, instead of a cast at every step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import STAND_IN, LoRALayer, LoRASlot
from .towers import TextTower, VisionTower, text_tower, vision_tower

__all__ = ["cast", "cast_anew", "frozen_in"]

# A text tower of open_clip sums in the dtype of its first c_fc's weight, or of what this attribute of that layer says.
_STREAM = "int8_original_dtype"
_PRODUCTS = (nn.Linear.forward, nn.Conv2d.forward, nn.MultiheadAttention.forward)
_NAMES = ("weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's frozen weights and buffers to `dtype`, in place, once.

    The whole model then computes in `dtype`, what is summed between the blocks as well; `frozen_in` leaves that to autocast.
    What is trained stays as it is (the adapters' fp32 masters), so does what is meant to be fp32: logit_scale, logit_bias, and
    norms that compute in fp32 themselves.

    Args:
        dtype: torch.float32, torch.bfloat16 or torch.float16.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    for module in model.modules():
        if type(module).__name__ == "LayerNormFp32":
            continue
        for name, parameter in module.named_parameters(recurse=False):
            adapter = isinstance(module, (LoRALayer, LoRASlot)) and name in ("lora_A", "lora_B")
            if not parameter.requires_grad and not adapter and not (module is model and name.startswith("logit_")):
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype.is_floating_point:
                module._buffers[name] = buffer.to(dtype)


@contextlib.contextmanager
def frozen_in(dtype: torch.dtype | None, *models: nn.Module) -> Iterator[None]:
    """Within: the frozen weights that autocast casts to `dtype` are in it, so that a step under autocast casts none of them.

    Autocast itself casts them anew at every call, as its cache holds only what requires a gradient. What it computes stays the
    same bit for bit: what products read alone is cast, and the towers go on summing in the dtype they had. Afterwards, whatever
    happens within, the models have their own tensors again. These stay where they are meanwhile: the cast ones come on top, in
    place of those that autocast makes and keeps for backward.

    Args:
        dtype: autocast's, or None for no autocast: nothing is done.
        models: open_clip models, which may share parameters. A tower that `cast_anew` names is left as it is.

    Raises:
        TypeError: a model of another family.
    """
    originals: dict[nn.Parameter, Tensor] = {}
    first_layers = []
    for model in () if dtype is None else models:
        for tower in (text_tower(model), vision_tower(model)):
            if isinstance(tower, str):
                continue
            originals |= {p: p.data for p in _in_products(tower) if p.dtype == torch.float32 and not p.requires_grad}
            if isinstance(tower, TextTower):
                first_layers.append(tower.blocks[0].mlp.c_fc)
    marked = [layer for layer in first_layers if layer.weight in originals and not hasattr(layer, _STREAM)]
    try:
        for layer in marked:
            setattr(layer, _STREAM, layer.weight.dtype)
        for parameter, data in originals.items():
            parameter.data = data.to(dtype)
            setattr(parameter, STAND_IN, True)
        yield
    finally:
        for parameter, data in originals.items():
            parameter.data = data
            vars(parameter).pop(STAND_IN, None)
        for layer in marked:
            vars(layer).pop(_STREAM, None)


def cast_anew(model: nn.Module) -> list[str]:
    """The towers of `model` whose weights `frozen_in` leaves to autocast, each in words with the reason."""
    towers = {"text": text_tower(model), "image": vision_tower(model)}
    why = "runs by the host's own method, and its frozen weights are cast anew at every step"
    return [f"the {name} tower {why}: {tower}" for name, tower in towers.items() if isinstance(tower, str)]


def _in_products(tower: TextTower | VisionTower) -> Iterator[nn.Parameter]:
    """What is read by products alone, or put into the dtype of a product's result."""
    host = tower.host
    parts: list[Any] = [*tower.blocks, host.text_projection] if isinstance(tower, TextTower) else [host, host.proj]
    if isinstance(tower, VisionTower):
        parts += [host.class_embedding, host.positional_embedding]  # added to conv1's result
    for part in parts:
        if isinstance(part, nn.Parameter):
            yield part
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if type(module).forward in _PRODUCTS or isinstance(module, LoRALayer):
                yield from (p for name in _NAMES if (p := module._parameters.get(name)) is not None)
