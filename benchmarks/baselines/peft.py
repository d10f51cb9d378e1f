"""PEFT's LoRA on separate q, k, v linears, as on hosts that have them (on nn.MultiheadAttention it ignores dropout)."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor, nn

from .common import SeparateTrainee


class Peft(SeparateTrainee):
    """lora.Linear with PEFT's defaults; needs the extra `peft`."""

    name = "PEFT"

    @classmethod
    def missing(cls) -> str | None:
        return None if importlib.util.find_spec("peft") else "peft is not installed: pip install peft"

    def adapted(self, linear: nn.Linear, a: Tensor, b: Tensor) -> nn.Module:
        from peft import LoraConfig, inject_adapter_in_model

        job = self.job
        config = LoraConfig(r=job.rank, lora_alpha=job.rank * job.scale, lora_dropout=job.dropout, target_modules=["0"])
        module: Any = inject_adapter_in_model(config, nn.ModuleList([linear]))[0]
        module.lora_A["default"].weight.data.copy_(a)
        module.lora_B["default"].weight.data.copy_(b)
        return module.to(job.device)

    def pair(self, module: Any) -> tuple[Tensor, Tensor]:
        return module.lora_A["default"].weight, module.lora_B["default"].weight
