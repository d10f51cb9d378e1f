"""timm's vision transformers: ViT, DeiT, EVA, BEiT, Swin and whatever else has blocks with attn.qkv."""

from __future__ import annotations

from torch import nn

from .sites import Layout, Tower, has, separate, tower

__all__ = ["layout", "tower_at", "towers"]

_LOOKED_FOR = "attn.qkv, or attn.q_proj, k_proj and v_proj"
_FC1 = ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.w1", "mlp.w2")


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """The model as its one tower."""
    return (tower_at(model, "vision", ""),)


def tower_at(model: nn.Module, encoder: str, path: str) -> Tower:
    """The tower at `path`, which may be a wrapper around timm's model."""
    return tower(model, encoder, path, layout, _LOOKED_FOR)


def layout(block: nn.Module) -> Layout | None:
    """The layout of a transformer block."""
    if not has(block, "attn"):
        return None
    attention = block.get_submodule("attn")
    # of gated MLPs fc1 is all that stands before the gate; EVA's w1, w2, w3 are fc1, fc1, fc2
    rest = {
        "out": _present(block, "attn.proj"),
        "fc1": _present(block, *_FC1),
        "fc2": _present(block, "mlp.fc2", "mlp.w3"),
    }
    if has(attention, "q_proj", "k_proj", "v_proj"):
        return Layout("attn", separate("q_proj", "k_proj", "v_proj"), **rest)
    if not has(attention, "qkv"):
        return None
    # separate biases: the attention gives qkv.weight to F.linear itself and may never call qkv
    if getattr(attention, "q_bias", None) is not None:
        return Layout("attn", ("qkv.weight",), **rest)
    return Layout("attn.qkv", **rest)


def _present(block: nn.Module, *paths: str) -> tuple[str, ...]:
    return tuple(path for path in paths if has(block, path))
