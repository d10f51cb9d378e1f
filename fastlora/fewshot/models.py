"""Models by name: open_clip's, a local checkpoint, or the mini CLIP. Names are checked before anything is built."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoRAConfig
from .errors import UserError

__all__ = ["MINI", "LoadedModel", "check", "check_adapter", "load"]

MINI = "mini"
SCHEMAS = ("hf-hub:", "local-dir:")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and what its inputs look like: image side in pixels, mean and std of pixels in [0, 1], texts -> tokens."""

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tokenise(self, templates: Sequence[str], classes: Sequence[str]) -> Tensor:
        """The prompts of each class, int64 (classes, templates, length), on the CPU."""
        tokens = self.tokenizer([template.format(name) for name in classes for template in templates])
        return tokens.view(len(classes), len(templates), -1)


def check(name: str, pretrained: str | None) -> dict[str, Any] | None:
    """The config of the model called `name` (None where only the hub knows it).

    Raises:
        UserError: no such model, tag or file; names the closest ones.
    """
    import open_clip

    if name == MINI:
        import json

        from .. import mini

        return json.loads((Path(mini.__file__).parent / "config.json").read_text(encoding="utf-8"))
    if name.startswith("hf-hub:"):
        return None
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"model {name}: no open_clip_config.json in {folder}")
        return open_clip.get_model_config(name)
    key = name.replace("/", "-")
    models = open_clip.list_models()
    if key not in models:
        raise UserError(f"unknown model {name!r}: {_close(key, [MINI, *models])}")
    if pretrained is not None and not open_clip.pretrained.is_pretrained_cfg(key, pretrained):
        tags = open_clip.list_pretrained_tags_by_model(key)
        if not Path(pretrained).is_file():
            known = _close(pretrained, tags) if tags else "it has no tags: give a file, or none"
            raise UserError(f"unknown pretrained tag or file {pretrained!r} for {name}: {known}")
    return open_clip.get_model_config(key)


def check_adapter(config: dict[str, Any] | None, lora: LoRAConfig) -> None:
    """Raise UserError where the config alone shows that a rank or a block does not fit; `patch` checks the rest."""
    for encoder, key in (("vision", "vision_cfg"), ("text", "text_cfg")):
        tower = (config or {}).get(key, {})
        width, depth = tower.get("width"), tower.get("layers")
        if encoder not in lora.encoders:
            continue
        if isinstance(width, int) and lora.rank > width:
            raise UserError(f"rank {lora.rank} is above the width of the {encoder} encoder, {width}: choose a smaller rank")
        if isinstance(depth, int):
            try:
                lora.layer_indices(depth)
            except ValueError as error:
                raise UserError(f"{error} (the {encoder} encoder)") from error


def load(name: str, pretrained: str | None, device: torch.device) -> LoadedModel:
    """Build the model, fp32 and in eval mode, on `device`.

    Raises:
        UserError: weights that cannot be fetched or do not fit.
    """
    import open_clip

    if name == MINI:
        from .. import mini

        try:
            model, tokenizer = mini.load()
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    else:
        key = name if name.startswith(SCHEMAS) else name.replace("/", "-")
        tag = open_clip.pretrained.get_pretrained_cfg(key, pretrained) if pretrained else {}
        try:
            with _quiet():
                # weights trained with QuickGELU are wrong under GELU, and the tag knows which it was
                quick = bool(tag.get("quick_gelu"))
                model = open_clip.create_model(key, pretrained, force_quick_gelu=quick)
                tokenizer = open_clip.get_tokenizer(key)
        except Exception as error:  # open_clip raises bare RuntimeErrors, torch and the hub their own
            reason = " ".join(str(error).split())[:200]
            hint = "" if pretrained is None or Path(pretrained).is_file() else "; without internet give a checkpoint file"
            raise UserError(f"cannot load {name} with pretrained {pretrained!r}: {reason}{hint}") from error
    visual: Any = model.visual
    size = visual.image_size
    if isinstance(size, Sequence):
        if len(set(size)) != 1:
            raise UserError(f"{name} takes images of {tuple(size)} pixels; only square ones are supported")
        size = size[0]
    mean, std = (getattr(visual, attr, None) for attr in ("image_mean", "image_std"))
    mean, std = mean or open_clip.OPENAI_DATASET_MEAN, std or open_clip.OPENAI_DATASET_STD
    return LoadedModel(model.to(device).eval(), tokenizer, int(size), tuple(mean), tuple(std))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _close(name: str, names: Sequence[str]) -> str:
    folded = {n.lower(): n for n in names}
    close = [folded[n] for n in difflib.get_close_matches(name.lower(), list(folded), n=4, cutoff=0.4)]
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(names[:8])}, …"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip and the hub log what we say in one line, or what was asked for (random weights)."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
