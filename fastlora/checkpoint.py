"""Adapters in and out: safetensors with the config in the metadata. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import LoRAConfig
from .patch import PatchReport, config_of, lora_layers, patch, unmerge, unpatch

__all__ = ["load", "save"]

KEY, FORMAT = "fastlora", 1
# A half-precision copy of the same base differs by its rounding, another checkpoint by everything.
_SAMPLES, _RELATIVE = 16, 1e-2


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the adapters of a patched model to one safetensors file, whole or not at all.

    Tensors: `<module path>.lora_A` (g, R, K) and `.lora_B` (g · N/G, R), fp32. Metadata: the LoRAConfig, and a few values of
    each base weight, by which `load` knows the base again.

    Raises:
        ValueError: the model is not patched.
        OSError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _adapters(model).items():
        tensors[name] = parameter.detach().float().cpu().contiguous()
    config = config_of(model)
    assert config is not None
    # one key: safetensors writes several in any order, and equal adapters should be equal files
    metadata = {KEY: json.dumps({"format": FORMAT, "config": config.to_dict(), "base": _fingerprint(model)})}
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, target)
    except SafetensorError as error:  # safetensors wraps a full disk or a missing folder
        raise OSError(f"cannot write {target}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def load(model: nn.Module, path: str | os.PathLike[str], *, check_base: bool = True) -> PatchReport:
    """Put adapters from a file that `save` wrote onto `model`, patching it with the file's config if it is not patched.

    The file is checked as a whole before the model is touched.

    Args:
        check_base: refuse an adapter that was trained on other base weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter file, or one for another model, rank, config or base; says what differs.
    """
    config, base, tensors = _read(Path(path))
    was_patched = config_of(model)
    if was_patched is not None and was_patched != config:
        raise ValueError(f"{path} was saved with {config}, the model is patched with {was_patched}: unpatch it first")
    # drawing the initial A of a fresh patch must not move the caller's generator
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        report = patch(model, config)
    try:
        _check(model, path, base if check_base else {}, tensors)
    except ValueError:
        if was_patched is None:
            unpatch(model)
        raise
    with torch.no_grad():
        unmerge(model)
        for name, parameter in _adapters(model).items():
            parameter.copy_(tensors[name])
    return report


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters under the names they have in a file."""
    return {
        f"{path}.{name}": parameter
        for path, layer in lora_layers(model)
        if layer.adapted
        for name, parameter in zip(("lora_A", "lora_B"), layer.adapters(), strict=True)
    }


def _read(path: Path) -> tuple[LoRAConfig, dict[str, list[float]], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if values.get("format") != FORMAT:
                raise ValueError(f"{path} is no fastlora adapter of format {FORMAT}: its metadata says {values.get('format')}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return LoRAConfig.from_dict(values["config"]), values["base"], tensors
    except (SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable safetensors adapter: {error}") from None


def _fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of each adapted base weight, evenly spread."""
    values = {}
    for name, layer in lora_layers(model):
        weight = layer.base_weight.detach() if layer._frozen_weight is None else layer._frozen_weight
        flat = weight.flatten()
        values[name] = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().tolist()
    return values


def _check(model: nn.Module, path: object, base: dict[str, list[float]], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError on the first thing that does not fit the patched model."""
    expected = {name: parameter.shape for name, parameter in _adapters(model).items()}
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{path} is for another model: it lacks {missing[0]} ({len(missing)} of {len(expected)} missing)")
    if extra := sorted(set(tensors) - set(expected)):
        raise ValueError(f"{path} is for another model: it holds {extra[0]} ({len(extra)} tensors have no place here)")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path} is for another model: {name} is {tuple(tensors[name].shape)}, here {tuple(shape)}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{path} is damaged: {name} holds NaN or infinite values")
    here = _fingerprint(model) if base else {}
    for name, values in base.items():
        a, b = torch.tensor(values), torch.tensor(here.get(name, []))
        if a.shape != b.shape or not torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE * float(a.abs().max())):
            raise ValueError(
                f"{path} was trained on other base weights ({name} differs): load that checkpoint, or pass check_base=False"
            )
