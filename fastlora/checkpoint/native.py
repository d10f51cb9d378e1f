"""fastlora's own file: safetensors, the config and the base's fingerprint in its metadata."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..beside import Kept, sample, whole
from ..config import LoRAConfig
from ..plan import Plan
from ..record import lora_layers
from .files import open_safetensors, readable, write_safetensors
from .network import KEY, Network

__all__ = ["NativeFile", "write"]

FORMAT = 1
WHAT = "safetensors adapter"
# A half-precision copy of the same base differs by its rounding, another checkpoint by everything.
_RELATIVE = 1e-2


def write(
    model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor], beside: dict[str, Tensor], network: Network, path: Path
) -> None:
    """Write the adapter's tensors, `<module path>.lora_A` (g, R, K) and `.lora_B` (g · N/G, R), and under their own names those
    that were trained beside it; equal adapters are equal files."""
    adapted = {name: layer for name, layer in lora_layers(model) if f"{name}.lora_A" in tensors}
    base = {
        name: _fingerprint(layer.base_weight if layer._frozen_weight is None else layer._frozen_weight)
        for name, layer in adapted.items()
    }
    values: dict[str, Any] = {"format": FORMAT, "config": config.to_dict(), "base": base, "network": network.to_dict()}
    if beside:
        values["beside"] = {name: tensor.requires_grad for name, tensor in beside.items()}
    # one key: safetensors writes several in any order
    write_safetensors(path, tensors | beside, {KEY: json.dumps(values)})


class NativeFile:
    """An adapter file, its metadata read and its tensors not yet.

    Raises:
        ValueError: not such a file, or a config that LoRAConfig does not take.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with readable(path, f"not a readable {WHAT}"), open_safetensors(path, WHAT) as file:
            values = json.loads((file.metadata() or {}).get(KEY, "{}"))
            if (found := values.get("format")) != FORMAT:
                hint = "; for a PEFT adapter give its folder" if path.name == "adapter_model.safetensors" else ""
                raise ValueError(f"{path} is no fastlora adapter of format {FORMAT}: its metadata says {found}{hint}")
            self._config = LoRAConfig.from_dict(values["config"])
            self._base = {name: _numbers(base) for name, base in values["base"].items()}
            self._beside = {name: bool(trained) for name, trained in values.get("beside", {}).items()}
            # files of earlier versions do not have it
            self.network = Network.from_dict(values["network"]) if "network" in values else None
            self.names = set(file.keys())

    def config(self, model: nn.Module, patched: LoRAConfig | None) -> LoRAConfig:
        """The config in the metadata."""
        return self._config

    def tensors(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """The adapter's tensors, which must be those that are planned: names are compared before anything is read.

        Raises:
            ValueError: one is missing, or one too many.
        """
        expected = set(plan.shapes)
        if missing := sorted((expected | set(self._beside)) - self.names):
            raise ValueError(
                f"{self.path} is for another model: it lacks {missing[0]} ({len(missing)} of {len(expected)} missing)"
            )
        if extra := sorted(self.names - expected - set(self._beside)):
            raise ValueError(f"{self.path} is for another model: it holds {extra[0]} ({len(extra)} tensors have no place here)")
        return self._read(expected)

    @property
    def beside(self) -> dict[str, Kept]:
        """What was trained beside the adapter, and whether it still required a gradient when it was saved."""
        return {name: Kept(tensor, self._beside[name]) for name, tensor in self._read(set(self._beside)).items()}

    def check_base(self, model: nn.Module, plan: Plan) -> None:
        """Raise ValueError where the planned modules' weights are not those of the file."""
        if odd := sorted(set(self._base) ^ set(plan.adapted)):
            raise ValueError(f"{self.path} is damaged: its fingerprint of the base and its config differ on {odd[0]}")
        for name, module in plan.adapted.items():
            a, b = (torch.tensor(v, dtype=torch.float64) for v in (self._base[name], _fingerprint(module.base_weight)))
            if a.shape != b.shape or not torch.allclose(a, b, rtol=_RELATIVE, atol=_RELATIVE * float(a.abs().max())):
                raise ValueError(
                    f"{self.path} was trained on other base weights ({name} differs): load that checkpoint, or pass"
                    " check_base=False"
                )

    def _read(self, names: set[str]) -> dict[str, Tensor]:
        with readable(self.path, f"not a readable {WHAT}"), open_safetensors(self.path, WHAT) as file:
            return {name: file.get_tensor(name) for name in sorted(names)}


def _fingerprint(weight: Tensor) -> list[float]:
    """A few values of an adapted base weight."""
    return sample(whole(weight)).float().tolist()


def _numbers(values: Any) -> list[float]:
    """A fingerprint as it is in a file: finite numbers, at least one."""
    if not isinstance(values, list) or not values or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
        raise ValueError("its fingerprint of the base is not of finite numbers")
    return [float(value) for value in values]
