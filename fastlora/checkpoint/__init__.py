"""Adapters in and out: fastlora's own safetensors, PEFT's folder, the paper's lora_weights.pt. No code in a file is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..patch import PatchReport, config_of, lora_layers, patch, unmerge, unpatch
from . import native, paper, peft

__all__ = ["load", "save"]

Format = Literal["fastlora", "peft", "clip-lora"]


def save(model: nn.Module, path: str | os.PathLike[str], *, format: Format = "fastlora") -> None:
    """Write the adapters of a patched model, whole or not at all.

    Args:
        path: a file; a folder for "peft".
        format: "fastlora": one safetensors file, `<module path>.lora_A` (g, R, K) and `.lora_B` (g · N/G, R) in fp32, the
            LoRAConfig and a few values of each base weight, by which `load` knows the base again, in its metadata.
            "peft": adapter_config.json and adapter_model.safetensors for transformers' CLIPModel with the same weights.
            "clip-lora": the lora_weights.pt of the paper's code; q, k, v, o and one rank only.

    Raises:
        ValueError: the model is not patched, the format is unknown or cannot hold this adapter.
        OSError: the file cannot be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}: choose from {', '.join(get_args(Format))}")
    tensors = {name: parameter.detach().float() for name, parameter in _adapters(model).items()}
    config = config_of(model)
    assert config is not None
    if format == "fastlora":
        native.write(model, config, tensors, Path(path))
    else:
        (peft if format == "peft" else paper).write(model, config, Path(path))


def load(model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True) -> PatchReport:
    """Put adapters from a file on `model`, patching it with the file's config if it is not patched.

    What is given is recognised: a safetensors file that `save` wrote, the folder of a PEFT adapter for transformers' CLIP, a
    lora_weights.pt of the paper's code. It is checked as a whole before an adapter is touched; a model that was not patched is
    plain again after an error. Pickles are read by torch's weights-only reader: tensors and plain containers, no code.

    Args:
        check_base: refuse an adapter that was trained on other base weights (fastlora's own files know theirs).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter, or one for another model, rank, config or base; says what differs.
    """
    source = _open(Path(path), model)
    was_patched = config_of(model)
    config = source.config(model, was_patched)
    if was_patched is not None and was_patched != config:
        raise ValueError(f"{path} was saved with {config}, the model is patched with {was_patched}: unpatch it first")
    # drawing the initial A of a fresh patch must not move the caller's generator
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        report = patch(model, config)
    try:
        adapters = _adapters(model)
        tensors = source.tensors(model, set(adapters))
        _check(path, adapters, tensors)
        if check_base:
            source.check_base(model)
    except ValueError:
        if was_patched is None:
            unpatch(model)
        raise
    with torch.no_grad():
        unmerge(model)
        for name, parameter in adapters.items():
            parameter.copy_(tensors[name])
    return report


class Source(Protocol):
    """An adapter that was found in a file, in any format."""

    def config(self, model: nn.Module, patched: LoRAConfig | None) -> LoRAConfig:
        """How to patch the model for it; `patched`: how it is patched now."""

    def tensors(self, model: nn.Module, expected: set[str]) -> dict[str, Tensor]:
        """What the patched model's adapters should hold, by the names in `expected`; ValueError if it is not all or more."""

    def check_base(self, model: nn.Module) -> None:
        """Raise ValueError where the base is known to be another."""


def _open(path: Path, model: nn.Module) -> Source:
    if path.is_dir():
        if not (path / peft.CONFIG).is_file():
            raise ValueError(f"{path} is a folder without {peft.CONFIG}: give a PEFT adapter's folder, or a file")
        return peft.read(path, model)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    with path.open("rb") as file:
        head = file.read(4)
    # a zip, as torch.save writes, or a bare pickle of protocol 2 and above, as it did before
    if head.startswith((b"PK\x03\x04", b"\x80")) and path.suffix != ".safetensors":
        return paper.read(path, model)
    return native.NativeFile(path)


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters under the names they have in a file."""
    return {
        f"{path}.{name}": parameter
        for path, layer in lora_layers(model)
        if layer.adapted
        for name, parameter in zip(("lora_A", "lora_B"), layer.adapters(), strict=True)
    }


def _check(path: object, expected: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError on the first tensor that does not fit the patched model."""
    for name, parameter in expected.items():
        if (shape := tuple(parameter.shape)) != tensors[name].shape:
            raise ValueError(f"{path} is for another model: {name} is {tuple(tensors[name].shape)}, here {shape}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path} is damaged: {name} holds NaN or infinite values")
