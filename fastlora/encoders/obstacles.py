"""What keeps the encoders from standing in for a module: a hook that would not run, a forward that is not the one they know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["obstacle", "replaced"]

# Whose forward the encoders compute, or call on rows that are packed: each row by itself, but for attention.
_KNOWN = {
    "torch.nn.modules": {
        "Conv2d", "Dropout", "Embedding", "GELU", "Identity", "LayerNorm", "Linear", "MultiheadAttention", "Sequential"
    },
    "open_clip.transformer": {
        "AttentionalPooler", "LayerNorm", "LayerNormFp32", "LayerScale", "PatchDropout", "QuickGELU", "ResidualAttentionBlock",
        "TextTransformer", "Transformer", "VisionTransformer",
    },
    "fastlora.layers": {"LoRALinear", "LoRAMultiheadAttention"},
}  # fmt: skip
_FORWARDS = {(package, f"{name}.forward") for package, names in _KNOWN.items() for name in names}
# Methods beside forward that a host's own way runs.
_METHODS = ("attention", "_embeds", "_pool", "_global_pool", "_build_additive_mask")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def obstacle(roots: Iterable[nn.Module]) -> str | None:
    """Why the host's own way must run, for one of the modules in `roots` or for all; None where nothing speaks against it."""
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "a hook on all modules would not run"
    for root in roots:
        for module in root.modules():
            own = module.__dict__
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return f"a forward hook on {_where(module, root)} would not run"
            if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return f"a backward hook on {_where(module, root)} would not run"
            if (name := replaced(module, "forward", *_METHODS)) is not None:
                return f"{_where(module, root)} has a {name} of its own"
            if type(module).forward is not nn.Module.forward and not _known(type(module).forward):
                return f"{_where(module, root)} has a forward that is not known here"
            if isinstance(module, nn.MultiheadAttention) and module.dropout and module.training:
                return "its attention drops out"
    return None


def replaced(owner: Any, *methods: str) -> str | None:
    """Which of `methods` was replaced, on the object itself or on its class; None where none was."""
    kind = type(owner)
    for name in methods:
        if name in owner.__dict__:
            return name
        for cls in kind.__mro__:
            if name in cls.__dict__:
                # what was put into a class from outside goes by another name
                method = cls.__dict__[name]
                if name != "forward" and getattr(method, "__qualname__", "") != f"{cls.__qualname__}.{name}":
                    return name
                break
    return None


def _known(forward: Any) -> bool:
    module, name = forward.__module__, forward.__qualname__
    return any((package, name) in _FORWARDS for package in (module, module.rpartition(".")[0]))


def _where(module: nn.Module, root: nn.Module) -> str:
    """The module's class, and its path below the root's class."""
    path = next(path for path, other in root.named_modules() if other is module)
    return f"{type(root).__name__}{'.' if path else ''}{path}" + (f" ({type(module).__name__})" if path else "")
