"""open_clip up to 3.x: CLIP, CustomTextCLIP and CoCa, whose blocks hold nn.MultiheadAttention."""

from __future__ import annotations

from torch import nn

from . import Site, Tower

__all__ = ["matches", "towers"]


def matches(model: nn.Module) -> bool:
    """Whether `model` has open_clip's two encoders: .visual beside .transformer (CLIP) or .text (CustomTextCLIP, CoCa)."""
    return all(hasattr(model, name) for name in ("visual", "encode_image", "encode_text")) and (
        hasattr(model, "transformer") or hasattr(model, "text")
    )


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """The text tower, then the vision tower; a refused one has no blocks and says why."""
    return (
        _tower(model, "text", "text.transformer" if hasattr(model, "text") else "transformer"),
        _tower(model, "vision", "visual.transformer"),
    )


def _tower(model: nn.Module, encoder: str, path: str) -> Tower:
    owner = path.rpartition(".")[0]
    try:
        blocks = list(model.get_submodule(f"{path}.resblocks").children())
    except AttributeError:
        found = type(model.get_submodule(owner)).__name__
        return Tower(encoder, path, (), f"{found} has no transformer of residual attention blocks")
    if not isinstance(getattr(blocks[0], "attn", None), nn.MultiheadAttention):
        attention = type(getattr(blocks[0], "attn", None)).__name__
        return Tower(encoder, path, (), f"its blocks attend with {attention}, not nn.MultiheadAttention")
    sites = []
    for i in range(len(blocks)):
        block = f"{path}.resblocks.{i}"
        sites.append(
            (
                Site(f"{block}.attn", ("q", "k", "v"), carries=("o",)),
                Site(f"{block}.attn.out_proj", ("o",)),
                Site(f"{block}.mlp.c_fc", ("fc1",)),
                Site(f"{block}.mlp.c_proj", ("fc2",)),
            )
        )
    return Tower(encoder, path, tuple(sites))
