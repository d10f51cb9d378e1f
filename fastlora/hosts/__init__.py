"""Where the attention of a model lives. One small file per family, imported only when such a model is met."""

from __future__ import annotations

import dataclasses

from torch import nn

__all__ = ["Block", "Tower", "towers"]


@dataclasses.dataclass(frozen=True)
class Block:
    """The adaptable modules of one transformer block, as paths within the model; None where it has none.

    Args:
        attention: nn.MultiheadAttention (packed q, k, v), or the Linear of a packed q, k, v.
        out: the output projection (o).
        fc1, fc2: the two Linears of the MLP.
    """

    attention: str
    out: str | None = None
    fc1: str | None = None
    fc2: str | None = None


@dataclasses.dataclass(frozen=True)
class Tower:
    """One encoder: its blocks from bottom to top, or the reason why it cannot be adapted."""

    encoder: str
    path: str
    blocks: tuple[Block, ...]
    refused: str | None = None


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """The text and vision towers of a CLIP model, text first.

    Raises:
        TypeError: no known family; names what was looked for.
    """
    from . import open_clip

    if open_clip.matches(model):
        return open_clip.towers(model)
    raise TypeError(
        f"fastlora does not know {type(model).__module__}.{type(model).__qualname__}: looked for an open_clip model with"
        " .visual and .transformer (CLIP) or .text (CustomTextCLIP, CoCa). For another model call fastlora.lora_linear in"
        " your own module"
    )
