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
# What a host's own way runs.
_METHODS = {"forward", "attention", "_embeds", "_pool", "_global_pool", "_build_additive_mask"}
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")


def obstacle(roots: Iterable[nn.Module]) -> str | None:
    """Why the host's own way must run, for one of the modules in `roots` or for all; None where nothing speaks against it."""
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "a hook on all modules would not run"
    kinds: dict[type[nn.Module], str | None] = {}
    for root in roots:
        for module in root.modules():
            own, kind = module.__dict__, type(module)
            if kind not in kinds:
                kinds[kind] = _strange(kind)
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return f"a forward hook on {_where(module, root)} would not run"
            if own["_backward_hooks"] or own["_backward_pre_hooks"]:
                return f"a backward hook on {_where(module, root)} would not run"
            if (name := kinds[kind]) is not None or not _METHODS.isdisjoint(own):
                return f"{_where(module, root)} has its own {name or min(_METHODS.intersection(own))}, which is not known here"
            if own.get("dropout") and module.training and isinstance(module, nn.MultiheadAttention):
                return "its attention drops out"
    return None


def replaced(owner: Any, *methods: str) -> str | None:
    """Which of `methods` was replaced, on the object itself or on its class; None where none was."""
    return next((name for name in methods if name in owner.__dict__ or _foreign(type(owner), name)), None)


def _strange(kind: type[nn.Module]) -> str | None:
    """The method of a class that is not the one known here, or None."""
    if kind.forward is not nn.Module.forward and not _known(kind.forward):
        return "forward"
    return next((name for name in _METHODS if name != "forward" and _foreign(kind, name)), None)


def _foreign(kind: type, name: str) -> bool:
    """Whether a class has a method that was put there from outside, which goes by another name."""
    if not hasattr(kind, name):
        return False
    cls = next(cls for cls in kind.__mro__ if name in cls.__dict__)
    return getattr(cls.__dict__[name], "__qualname__", "") != f"{cls.__qualname__}.{name}"


def _known(forward: Any) -> bool:
    module, name = forward.__module__, forward.__qualname__
    return (module, name) in _FORWARDS or (module.rpartition(".")[0], name) in _FORWARDS


def _where(module: nn.Module, root: nn.Module) -> str:
    """The module's class, and its path below the root's class."""
    path = next(path for path, other in root.named_modules() if other is module)
    return f"{type(root).__name__}{'.' if path else ''}{path}" + (f" ({type(module).__name__})" if path else "")
