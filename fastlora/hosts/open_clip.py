"""open_clip's CLIP, CustomTextCLIP and CoCa, with towers of its own, of timm or of transformers; and OpenAI's clip package.

open_clip took its blocks and their names from OpenAI's: nn.MultiheadAttention, out_proj, c_fc, c_proj. Its custom blocks, and
from 4 on all of its blocks, have an attention of open_clip's own with the same parameter names.
"""

from __future__ import annotations

from torch import nn

from .sites import Layout, Tower, has, tower

__all__ = ["layout", "towers"]

_LOOKED_FOR = "attn (nn.MultiheadAttention, or an attention with in_proj_weight) and mlp.c_fc"


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """The text tower, then the vision tower; a refused one has no blocks and says why."""
    text = "text" if isinstance(getattr(model, "text", None), nn.Module) else "transformer"
    return _tower(model, "text", text), _tower(model, "vision", "visual")


def layout(block: nn.Module) -> Layout | None:
    """The layout of a residual attention block."""
    if not has(block, "attn", "mlp.c_fc", "mlp.c_proj"):
        return None
    attention, rest = block.get_submodule("attn"), {"out": ("attn.out_proj",), "fc1": ("mlp.c_fc",), "fc2": ("mlp.c_proj",)}
    if isinstance(attention, nn.MultiheadAttention):
        return Layout("attn", **rest)
    return Layout("attn", ("in_proj_weight",), **rest) if hasattr(attention, "in_proj_weight") else None


def _tower(model: nn.Module, encoder: str, path: str) -> Tower:
    root = model.get_submodule(path)
    if hasattr(root, "trunk"):
        from . import timm

        return timm.tower_at(model, encoder, path)
    if hasattr(root, "config"):
        from . import transformers

        return transformers.tower_at(model, encoder, path)
    return tower(model, encoder, path, layout, _LOOKED_FOR)
