"""The whole model with its adapter merged in, as a checkpoint of the plain host that needs nothing of fastlora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..record import MergeReport, lora_layers, merge_report_of
from .files import atomic, atomic_folder, write_safetensors
from .network import KEY, Network

__all__ = ["ENDINGS", "plain_state", "write"]

ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


def write(model: nn.Module, path: Path, dtype: torch.dtype | None = None, network: Network | None = None) -> MergeReport:
    """Write a folder by `save_pretrained` for a transformers model, else a file of the host's state_dict; whole or not at all.

    The file is safetensors or, where its name ends in .pt, .pth or .bin, torch's, with the weights under "state_dict":
    open_clip reads both. It says which network the weights belong to. The model is left as it is.

    Args:
        dtype: of the floating-point weights in the file; default: the model's. The sum is made in fp32 before.
        network: what the model computes besides its weights; default: what can be seen of it.

    Raises:
        ValueError: a file name of another ending.
        FileExistsError: a transformers checkpoint's folder that is there already and not empty.
        OSError: it cannot be written.
    """
    folder = hasattr(model, "save_pretrained")
    if not folder and path.suffix not in ENDINGS:
        raise ValueError(f"{path} must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}: it becomes a file of weights")
    network = network or Network.of(model)
    state = plain_state(model, dtype)
    report = merge_report_of(model, dtype)
    if folder:
        with atomic_folder(path) as temporary:
            model.save_pretrained(temporary, state_dict=state)  # type: ignore[operator]
    elif path.suffix == ".safetensors":
        write_safetensors(path, state, network.metadata())
    else:
        with atomic(path) as temporary:
            torch.save({"state_dict": state, KEY: {"network": network.to_dict()}}, temporary)
    return report


@torch.no_grad()
def plain_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the host's state_dict with the active adapter merged in, each tensor on the CPU with memory of its own.

    Floating-point tensors come in `dtype`, by default in their own.
    """
    state: dict[str, Any] = model.state_dict()
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
