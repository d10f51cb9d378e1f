"""fastlora's own file: safetensors, the config and the base's fingerprint in its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from ..record import lora_layers
from .files import open_safetensors, whole, write_safetensors

__all__ = ["NativeFile", "write"]

KEY, FORMAT = "fastlora", 1
WHAT = "safetensors adapter"
# A half-precision copy of the same base differs by its rounding, another checkpoint by everything.
_SAMPLES, _RELATIVE = 16, 1e-2


def write(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """The adapter's tensors, `<module path>.lora_A` (g, R, K) and `.lora_B` (g · N/G, R); equal adapters are equal files."""
    # one key: safetensors writes several in any order
    base = {name: values for name, values in _fingerprint(model).items() if f"{name}.lora_A" in tensors}
    values = {"format": FORMAT, "config": config.to_dict(), "base": base}
    write_safetensors(path, tensors, {KEY: json.dumps(values)})


class NativeFile:
    """An adapter file, its metadata read and its tensors not yet.

    Raises:
        ValueError: not such a file, or a config that LoRAConfig does not take.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_safetensors(path, WHAT) as file:
            try:
                values = json.loads((file.metadata() or {}).get(KEY, "{}"))
                if (found := values.get("format")) != FORMAT:
                    hint = "; for a PEFT adapter give its folder" if path.name == "adapter_model.safetensors" else ""
                    raise ValueError(f"{path} is no fastlora adapter of format {FORMAT}: its metadata says {found}{hint}")
                self._config = LoRAConfig.from_dict(values["config"])
                self._base = {name: [float(v) for v in base] for name, base in values["base"].items()}
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path} is not a readable {WHAT}: its metadata has {error!r}") from None
            self.names = set(file.keys())

    def config(self, model: nn.Module, patched: LoRAConfig | None) -> LoRAConfig:
        """The config in the metadata."""
        return self._config

    def tensors(self, model: nn.Module, expected: set[str]) -> dict[str, Tensor]:
        """The tensors, which must be those of `expected`: names are compared before anything is read.

        Raises:
            ValueError: one is missing, or one too many.
        """
        if missing := sorted(expected - self.names):
            raise ValueError(
                f"{self.path} is for another model: it lacks {missing[0]} ({len(missing)} of {len(expected)} missing)"
            )
        if extra := sorted(self.names - expected):
            raise ValueError(f"{self.path} is for another model: it holds {extra[0]} ({len(extra)} tensors have no place here)")
        with open_safetensors(self.path, WHAT) as file:
            return {name: file.get_tensor(name) for name in expected}

    def check_base(self, model: nn.Module) -> None:
        """Raise ValueError where the patched model's base weights are not those of the file."""
        here = _fingerprint(model)
        for name, values in self._base.items():
            a, b = torch.tensor(values), torch.tensor(here.get(name, []))
            if a.shape != b.shape or not torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE * float(a.abs().max())):
                raise ValueError(
                    f"{self.path} was trained on other base weights ({name} differs): load that checkpoint, or pass"
                    " check_base=False"
                )


def _fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """A few values of each adapted base weight, evenly spread."""
    values = {}
    for name, layer in lora_layers(model):
        weight = whole(layer.base_weight if layer._frozen_weight is None else layer._frozen_weight)
        flat = weight.flatten()
        values[name] = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().tolist()
    return values
