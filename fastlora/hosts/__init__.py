"""Where the attention of a model lives. One small file per family, imported only when such a model is met."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

from torch import nn

from .named import sites as named
from .sites import Site, Tower

__all__ = ["Site", "Tower", "named", "towers"]


@dataclasses.dataclass(frozen=True)
class _Family:
    """A file of this folder, what it looks for in words, and the test itself."""

    file: str
    looked_for: str
    matches: Callable[[nn.Module], bool]


def _has(*names: str) -> Callable[[nn.Module], bool]:
    return lambda model: all(hasattr(model, name) for name in names)


# An open_clip model may hold a tower of the families below it, never the other way round.
_FAMILIES = (
    _Family(
        "open_clip", "open_clip's or OpenAI's CLIP (.visual beside .transformer)", _has("visual", "transformer", "encode_text")
    ),
    _Family("open_clip", "open_clip's CustomTextCLIP or CoCa (.visual beside .text)", _has("visual", "text", "encode_text")),
    _Family("transformers", "a transformers model (.config beside .main_input_name)", _has("config", "main_input_name")),
    _Family(
        "timm", "a timm vision transformer (.patch_embed beside .blocks or .layers)", _has("patch_embed", "forward_features")
    ),
)


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """The towers of a CLIP model, text first; one tower of a model that is an encoder by itself.

    Raises:
        TypeError: no known family; names what was looked for.
    """
    for family in _FAMILIES:
        if family.matches(model):
            return importlib.import_module(f".{family.file}", __name__).towers(model)
    raise TypeError(
        f"fastlora does not know {type(model).__module__}.{type(model).__qualname__}: looked for "
        + "; ".join(family.looked_for for family in _FAMILIES)
        + '. Name the modules to adapt instead: fastlora.patch(model, modules=("*.attn", "*.fc1"))'
    )
