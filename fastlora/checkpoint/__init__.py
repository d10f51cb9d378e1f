"""Adapters in and out: fastlora's own safetensors, PEFT's folder, the paper's lora_weights.pt. No code in a file is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..adapters import delete_adapter, set_adapter, using
from ..config import LoRAConfig
from ..layers import DEFAULT
from ..patch import add_adapter, unmerge, unpatch
from ..record import PatchReport, lora_layers, patched, record_of, report_of
from . import merged, native, paper, peft
from .files import whole

__all__ = ["load", "save"]

Format = Literal["fastlora", "peft", "clip-lora", "merged"]


def save(model: nn.Module, path: str | os.PathLike[str], *, format: Format = "fastlora", adapter: str | None = None) -> None:
    """Write an adapter of a patched model, or the model with it merged in; whole or not at all.

    Of a model that is sharded over processes (fully_shard) all of them must call: what they hold is gathered.

    Args:
        path: a file; a folder for "peft".
        format: "fastlora": one safetensors file, `<module path>.lora_A` (g, R, K) and `.lora_B` (g · N/G, R) in fp32, the
            LoRAConfig and a few values of each base weight, by which `load` knows the base again, in its metadata.
            "peft": adapter_config.json and adapter_model.safetensors for transformers' CLIPModel with the same weights.
            "clip-lora": the lora_weights.pt of the paper's code; q, k, v, o and one rank only.
            "merged": a checkpoint of the plain model that has the adapter in its weights: the file that open_clip's
            `create_model(..., pretrained=FILE)` takes, a folder for `from_pretrained` if the model is transformers'.
        adapter: the name of one; default: the active one.

    Raises:
        ValueError: the model is not patched, there is no such adapter, the format is unknown or cannot hold this adapter.
        OSError: the file cannot be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}: choose from {', '.join(get_args(Format))}")
    record = patched(model)
    name = record.active if adapter is None else adapter
    if name not in record.configs:
        raise ValueError(f"no adapter is called {name!r}: there are {', '.join(record.configs)}")
    with using(model, name):
        config = record.configs[name]
        if format == "fastlora":
            tensors = {key: whole(parameter).float() for key, parameter in _parameters(model).items()}
            native.write(model, config, tensors, Path(path))
        elif format == "merged":
            merged.write(model, Path(path))
        else:
            (peft if format == "peft" else paper).write(model, config, Path(path))


def load(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = DEFAULT, check_base: bool = True) -> PatchReport:
    """Put an adapter from a file on `model` and make it the active one.

    What is given is recognised: a safetensors file that `save` wrote, the folder of a PEFT adapter for transformers' CLIP, a
    lora_weights.pt of the paper's code. The model is patched with the file's config; where it has an adapter of that name and
    config, that one gets the values. The file is checked as a whole before: after an error the model is as it was. Pickles are
    read by torch's weights-only reader: tensors and plain containers, no code.

    Args:
        adapter: its name on the model.
        check_base: refuse an adapter that was trained on other base weights (fastlora's own files know theirs).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter, or one for another model, rank, config or base; says what differs.
    """
    source = _open(Path(path), model)
    record = record_of(model)
    there = None if record is None else record.configs.get(adapter)
    config = source.config(model, there)
    if there is not None and there != config:
        raise ValueError(
            f"{path} was saved with {config}, the model's {adapter!r} has {there}: unpatch it first, or give another name"
        )
    if there is None:
        active = None if record is None else record.active
        # drawing the initial A must not move the caller's generator
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            add_adapter(model, adapter, config)
    try:
        with using(model, adapter):
            parameters = _parameters(model)
            tensors = source.tensors(model, set(parameters))
            _check(path, parameters, tensors)
            if check_base:
                source.check_base(model)
    except ValueError:
        if record is None:
            unpatch(model)
        elif there is None:
            delete_adapter(model, adapter)
            set_adapter(model, active)
        raise
    unmerge(model)
    set_adapter(model, adapter)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return report_of(model)


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


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """lora_A and lora_B of the active adapter under the names they have in a file."""
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
