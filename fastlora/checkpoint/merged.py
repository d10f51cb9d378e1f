"""The whole model with its adapter merged in, as a checkpoint of the plain host that needs nothing of fastlora."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..record import MergeReport, lora_layers, merge_report_of
from .files import atomic, write_safetensors

__all__ = ["plain_state", "write"]


def write(model: nn.Module, path: Path, dtype: torch.dtype | None = None) -> MergeReport:
    """A folder by `save_pretrained` for a transformers model; else one file of the host's state_dict, safetensors or, where
    the name ends in .pt, .pth or .bin, torch's. Whole or not at all; the model is left as it is.

    Args:
        dtype: of the floating-point weights in the file; default: the model's. The sum is made in fp32 before.

    Raises:
        FileExistsError: a transformers checkpoint's folder that is there already and not empty.
        OSError: it cannot be written.
    """
    state = plain_state(model, dtype)
    report = merge_report_of(model, dtype)
    if hasattr(model, "save_pretrained"):
        _write_folder(model, state, path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        with atomic(path) as temporary:
            torch.save(state, temporary)
    else:
        write_safetensors(path, state, {"format": "pt"})
    return report


@torch.no_grad()
def plain_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The host's state_dict with the active adapter merged in, each tensor on the CPU with memory of its own.

    Floating-point tensors come in `dtype`, by default in their own.
    """
    state = model.state_dict()
    for path, layer in lora_layers(model):
        for key in [key for key in state if key.startswith((f"{path}.lora_", f"{path}.named."))]:
            del state[key]
        if not layer.adapted or (layer.merged and dtype is None):
            continue
        whole = layer.merged_weight()
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        parts = layer.base_weights()
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            state[f"{path}.{names[id(part)]}"] = rows if dtype is not None else rows.to(part.dtype)
    converted = {k: t.to(dtype) if dtype is not None and t.is_floating_point() else t for k, t in state.items()}
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in converted.items()}


def _write_folder(model: Any, state: dict[str, Tensor], path: Path) -> None:
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} is there and not empty: give a folder of its own to a transformers checkpoint")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary, state_dict=state)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
