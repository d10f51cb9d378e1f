"""Drop-in modules: the host's own parameters under their own names, plus lora_A and lora_B.

A drop-in takes the place of one module instance. It shares the host's parameters, buffers, hooks and state_dict keys, so
optimizers, checkpoints and `model.to()` go on working, and the host can be put back as it was.
"""

from .adopt import adopt, refusal, release, tied
from .attention import LoRAMultiheadAttention
from .base import DEFAULT, STAND_IN, LoRALayer, LoRASlot
from .host_attention import LoRAHostAttention
from .linear import LoRALinear

__all__ = [
    "DEFAULT",
    "STAND_IN",
    "LoRAHostAttention",
    "LoRALayer",
    "LoRALinear",
    "LoRAMultiheadAttention",
    "LoRASlot",
    "adopt",
    "refusal",
    "release",
    "tied",
]
