"""The frozen weights in the compute dtype, once, instead of a cast at every step."""

from __future__ import annotations

import torch
from torch import nn

from ..layers import LoRALayer, LoRASlot

__all__ = ["cast"]


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's frozen weights and buffers to `dtype`, in place, once.

    What is trained stays as it is (the adapters' fp32 masters), so does what is meant to be fp32: logit_scale, logit_bias, and
    norms that compute in fp32 themselves. Autocast would cast frozen weights anew at every call: its cache holds only those
    that require a gradient.

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
