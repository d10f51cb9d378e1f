"""A small CLIP that ships with the package: 64 px images in 8 px patches, pretrained on Tiny-ImageNet (see README.md here).

No weights can be downloaded on a machine without internet; the demo and the tests rest on this one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["architecture", "build", "load"]

FOLDER = Path(__file__).parent


def architecture() -> dict[str, Any]:
    """Return the config in open_clip's words."""
    return json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))


def build() -> nn.Module:
    """The architecture with random weights: an open_clip CLIP, fp32, in eval mode."""
    from open_clip.model import CLIP, set_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg

    model = CLIP(**architecture()).eval()
    set_model_preprocess_cfg(model, dataclasses.asdict(PreprocessCfg(size=model.visual.image_size[0])))
    return model


def load() -> tuple[nn.Module, Any]:
    """The pretrained model (open_clip CLIP, fp32, eval mode) and open_clip's tokenizer (texts -> int64 (n, 77)).

    Raises:
        FileNotFoundError: the weights are not beside this file, so the installation is not complete.
    """
    from open_clip import SimpleTokenizer
    from safetensors.torch import load_file

    weights = FOLDER / "model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"the mini CLIP's weights are missing: {weights}; install fastlora again")
    model = build()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
    return model, SimpleTokenizer()
