"""transformers' CLIPModel and open_clip's CLIP with the same random weights, for adapters that travel between libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import TINY, tiny

_BLOCK = {
    "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
}  # fmt: skip
_TOP = {
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.patch_embedding": "visual.conv1", "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}  # fmt: skip


def open_clip_twin() -> Any:
    """open_clip's CLIP of TINY with the activation that transformers' CLIP has."""
    return tiny(quick_gelu=True)


def transformers_twin(model: nn.Module) -> Any:
    """transformers' CLIPModel with the weights of `open_clip_twin`."""
    from transformers import CLIPConfig, CLIPModel

    vision, text = TINY["vision_cfg"], TINY["text_cfg"]
    towers = {
        "text_config": {
            "hidden_size": text["width"], "num_attention_heads": text["heads"], "num_hidden_layers": text["layers"],
            "intermediate_size": 4 * text["width"], "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"], "bos_token_id": 0, "pad_token_id": 0,
            "eos_token_id": text["vocab_size"] - 1,
        },
        "vision_config": {
            "hidden_size": vision["width"], "num_attention_heads": vision["width"] // vision["head_width"],
            "num_hidden_layers": vision["layers"], "intermediate_size": 4 * vision["width"],
            "image_size": vision["image_size"], "patch_size": vision["patch_size"],
        },
    }  # fmt: skip
    twin = CLIPModel(CLIPConfig(**towers, projection_dim=TINY["embed_dim"], bos_token_id=0, eos_token_id=99)).eval()
    state = model.state_dict()
    values: dict[str, Tensor] = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "visual_projection.weight": state["visual.proj"].T,
    }
    pairs = dict(_TOP)
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        for i in range(3):
            theirs, ours = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            pairs |= {theirs + a: ours + b for a, b in _BLOCK.items()}
            for kind in ("weight", "bias"):
                for name, rows in zip("qkv", state[f"{ours}attn.in_proj_{kind}"].chunk(3), strict=True):
                    values[f"{theirs}self_attn.{name}_proj.{kind}"] = rows
    for theirs, ours in pairs.items():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in state:
                values[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    assert {name for name, _ in twin.named_parameters()} == set(values)
    twin.load_state_dict(values, strict=False)  # position_ids, a buffer, is the one thing left
    return twin


def transformers_features(model: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Image and text features of transformers' CLIPModel."""
    with torch.no_grad():
        found = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
    return tuple(f if isinstance(f, Tensor) else f.pooler_output for f in found)  # type: ignore[return-value]
