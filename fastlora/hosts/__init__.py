"""Where the attention of a model lives. One small file per family, imported only when such a model is met."""

from __future__ import annotations

import dataclasses

from torch import nn

__all__ = ["Site", "Tower", "towers"]


@dataclasses.dataclass(frozen=True)
class Site:
    """One module that can take an adapter.

    Args:
        path: the module within the model: a Linear, an nn.MultiheadAttention, or with `weights` an attention of the host's own.
        targets: what its groups of rows are: ("q", "k", "v"), or one of ("o",), ("fc1",), ("fc2",).
        weights: the parameters within the module that hold q, k, v (all in one, or one each), where the module's own forward
            gives them to F.linear.
        carries: targets of sites inside this module that it reads without calling them, so that their adapters work only with
            the drop-in around them.
    """

    path: str
    targets: tuple[str, ...]
    weights: tuple[str, ...] = ()
    carries: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tower:
    """One encoder: the sites of its blocks from bottom to top, or the reason why it cannot be adapted."""

    encoder: str
    path: str
    blocks: tuple[tuple[Site, ...], ...]
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
