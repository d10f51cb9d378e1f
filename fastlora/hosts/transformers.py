"""transformers: CLIP, SigLIP, SigLIP 2, their single towers, and the text models that open_clip wraps (RoBERTa, mT5, NLLB)."""

from __future__ import annotations

from typing import Any

from torch import nn

from .sites import Layout, Tower, has, separate, tower

__all__ = ["layout", "tower_at", "towers"]

_PROJ = separate("q_proj", "k_proj", "v_proj")
_LAYOUTS = (
    # CLIP, SigLIP, SigLIP 2
    Layout("self_attn", _PROJ, ("self_attn.out_proj",), ("mlp.fc1",), ("mlp.fc2",)),
    # M2M100 (NLLB)
    Layout("self_attn", _PROJ, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    # BERT, RoBERTa, XLM-RoBERTa
    Layout(
        "attention.self", separate("query", "key", "value"), ("attention.output.dense",),
        ("intermediate.dense",), ("output.dense",),
    ),
    # mT5, whose MLP is gated
    Layout(
        "layer.0.SelfAttention", separate("q", "k", "v"), ("layer.0.SelfAttention.o",),
        ("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"), ("layer.1.DenseReluDense.wo",),
    ),
)  # fmt: skip
_LOOKED_FOR = "q, k, v as three Linears: " + ", ".join(f"{layout.attention}" for layout in _LAYOUTS[1:])


def towers(model: Any) -> tuple[Tower, ...]:
    """The text tower, then the vision tower; a model of one tower is named by its main input."""
    found = [(encoder, f"{encoder}_model") for encoder in ("text", "vision") if hasattr(model, f"{encoder}_model")]
    if not found:
        found = [("vision" if model.main_input_name == "pixel_values" else "text", "")]
    return tuple(tower_at(model, encoder, path) for encoder, path in found)


def tower_at(model: nn.Module, encoder: str, path: str) -> Tower:
    """The tower at `path`, which may be a wrapper around a transformers model."""
    return tower(model, encoder, path, layout, _LOOKED_FOR)


def layout(block: nn.Module) -> Layout | None:
    """The layout of an encoder layer."""
    for known in _LAYOUTS:
        weights = (f"{known.attention}.{name.removesuffix('.weight')}" for name in known.weights)
        if has(block, *weights, *known.out, *known.fc1, *known.fc2):
            return known
    return None
