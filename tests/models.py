"""Small CLIP models with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.factory import get_model_config
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 48, "heads": 2, "layers": 3},
}


def tiny(seed: int = 0, quick_gelu: bool = False, **changes: dict[str, Any]) -> Any:
    """A CLIP of three blocks a tower; `vision_cfg` and `text_cfg` entries override TINY's."""
    torch.manual_seed(seed)
    config = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in TINY.items()}
    return CLIP(**config, quick_gelu=quick_gelu).eval()


def build(name: str, layers: int | None = None) -> Any:
    """open_clip's model `name` with random weights and 1000 words, at full width; `layers` cuts the depth of both towers."""
    config = get_model_config(name)
    assert config is not None
    custom = config.pop("custom_text", False) or "multimodal_cfg" in config
    config.pop("multimodal_cfg", None)  # CoCa's caption decoder is no encoder
    config["text_cfg"]["vocab_size"] = 1000
    if layers is not None:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    torch.manual_seed(0)
    return (CustomTextCLIP if custom else CLIP)(**config).eval()


def inputs(model: Any, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, H, W) and token ids (batch, context length) with the end token, the largest, somewhere inside."""
    generator = torch.Generator().manual_seed(seed)
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.randn(batch, 3, height, width, generator=generator)
    text = getattr(model, "text", model)
    vocabulary = text.vocab_size
    length = text.context_length
    tokens = torch.randint(3, vocabulary - 1, (batch, length), generator=generator)
    for i in range(batch):
        end = 3 + 2 * i
        tokens[i, end] = vocabulary - 1
        tokens[i, end + 1 :] = 0
    return images, tokens


def features(model: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text features; CoCa gives its tokens beside them."""
    image, text = model.encode_image(images), model.encode_text(tokens)
    return image[0] if isinstance(image, tuple) else image, text[0] if isinstance(text, tuple) else text


def randomise_adapters(model: nn.Module, std: float = 0.2, seed: int = 7) -> None:
    """Give lora_B values, so that the update is not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
