"""fastlora: fused LoRA for CLIP models. The verbs, and nothing else."""

from importlib.metadata import version as _version

from .adapters import delete_adapter, disabled, lora_parameters, set_adapter
from .checkpoint import load, save
from .config import LoRAConfig
from .encoders import encode_image, encode_text
from .functional import lora_linear
from .patch import add_adapter, merge, patch, unmerge, unpatch

__version__ = _version("fastlora-clip")
__all__ = [
    "LoRAConfig",
    "__version__",
    "add_adapter",
    "delete_adapter",
    "disabled",
    "encode_image",
    "encode_text",
    "load",
    "lora_linear",
    "lora_parameters",
    "merge",
    "patch",
    "save",
    "set_adapter",
    "unmerge",
    "unpatch",
]
