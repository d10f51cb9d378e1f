"""A CLIP as a folder that loads by itself: open_clip's local-dir form, and the form of transformers' CLIPModel.

    open_clip.create_model_and_transforms("local-dir:DIR")       open_clip_config.json, open_clip_model.safetensors
    transformers.CLIPModel.from_pretrained("DIR")                config.json, model.safetensors, the processor's files

Both say which activation and preprocessing the weights were trained with. One folder holds both: no file belongs to two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .files import write_safetensors
from .network import GELU, QUICK_GELU, Network

__all__ = ["refusal", "write_open_clip", "write_transformers"]

_HIDDEN_ACT = {GELU: "gelu", QUICK_GELU: "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_START, _END = "<|startoftext|>", "<|endoftext|>"
_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' own spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")


def write_open_clip(
    folder: Path, state: dict[str, Tensor], architecture: Mapping[str, Any], network: Network, tokenizer: Any
) -> None:
    """Write open_clip's files into `folder`.

    Args:
        state: the plain model's state_dict.
        architecture: its config in open_clip's words, as `open_clip.get_model_config` gives it.
        tokenizer: open_clip's; one of Hugging Face's is written beside the weights, where open_clip looks for it.
    """
    model = dict(architecture) | {"quick_gelu": QUICK_GELU in network.activation.values()}
    config = {"model_cfg": model, "preprocess_cfg": dict(network.preprocessing)}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "open_clip_model.safetensors", state, network.metadata())
    if hasattr(wrapped := getattr(tokenizer, "tokenizer", tokenizer), "save_pretrained"):
        wrapped.save_pretrained(folder)


def refusal(model: Any, state: Mapping[str, Tensor], network: Network, tokenizer: Any) -> str | None:
    """Return why transformers' CLIPModel cannot be this open_clip model, or None."""
    if foreign := next((name for name in state if name not in _NAMES and not _in_block(name)), None):
        return f"CLIPModel has no place for {foreign}"
    if missing := next((name for name in _NAMES if name not in state), None):
        return f"CLIPModel needs {missing}, which this model lacks"
    if unknown := set(network.activation.values()) - set(_HIDDEN_ACT):
        return f"its activation {min(unknown)} is not one that both know"
    if type(tokenizer).__name__ != "SimpleTokenizer" or len(tokenizer.encoder) != len(state["token_embedding.weight"]):
        return "its tokenizer is not CLIP's own"
    if network.preprocessing.get("resize_mode") == "longest":
        return "CLIPImageProcessor does not pad images"
    pools = getattr(model.visual, "pool_type", "tok"), getattr(model, "text_pool_type", "argmax")
    if pools != ("tok", "argmax") or getattr(model.visual, "final_ln_after_pool", False):
        return f"it pools otherwise than CLIPModel: {pools[0]} of the image, {pools[1]} of the text"
    return None


def write_transformers(folder: Path, model: Any, state: dict[str, Tensor], network: Network, tokenizer: Any) -> None:
    """Write the files of transformers' CLIPModel and CLIPProcessor into `folder`; `refusal` must be None.

    Args:
        model: the open_clip model, for what its weights do not show: heads, and the eps of its LayerNorms.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        renamed |= _in_block(name, tensor) or {_NAMES[name]: tensor.T if name in _TRANSPOSED else tensor}
    write_safetensors(folder / "model.safetensors", renamed, {"format": "pt"})  # which transformers asks for
    files: dict[str, Any] = {
        "config.json": _config(model, state, network),
        "preprocessor_config.json": _processor(network),
        "tokenizer_config.json": {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": network.context_length,
            "bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END,
        },
        "vocab.json": _vocabulary(tokenizer),
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=None if name == "vocab.json" else 2) + "\n", encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def _in_block(name: str, tensor: Tensor | None = None) -> dict[str, Any]:
    """Return a block's weight under transformers' name, or q, k and v of a packed one; nothing for any other name."""
    if (match := _BLOCK.fullmatch(name)) is None:
        return {}
    tower = "vision_model" if match[1] else "text_model"
    prefix, module, kind = f"{tower}.encoder.layers.{match[2]}.", match[3], match[4]
    if module == "attn.in_proj":
        parts = (None,) * 3 if tensor is None else tensor.chunk(3)
        return {f"{prefix}self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", parts, strict=True)}
    return {f"{prefix}{_IN_BLOCK[module]}.{kind}": tensor} if module in _IN_BLOCK else {}


def _config(model: Any, state: Mapping[str, Tensor], network: Network) -> dict[str, Any]:
    def tower(prefix: str, part: str, blocks: Any, embedding: Tensor) -> dict[str, Any]:
        return {
            "hidden_size": embedding.shape[-1],
            "intermediate_size": len(state[f"{prefix}transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_attention_heads": blocks[0].attn.num_heads,
            "num_hidden_layers": len(blocks),
            "hidden_act": _HIDDEN_ACT[network.activation[part]],
            "layer_norm_eps": blocks[0].ln_1.eps,
            "projection_dim": state["text_projection"].shape[1],
        }

    words = len(state["token_embedding.weight"])
    text = tower("", "text", model.transformer.resblocks, state["token_embedding.weight"]) | {
        "vocab_size": words, "max_position_embeddings": len(state["positional_embedding"]),
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1,
    }  # fmt: skip
    patches = state["visual.conv1.weight"]
    vision = tower("visual.", "vision", model.visual.transformer.resblocks, state["visual.class_embedding"]) | {
        "image_size": network.preprocessing["size"], "patch_size": patches.shape[-1], "num_channels": patches.shape[1],
    }  # fmt: skip
    return {
        "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": text["projection_dim"],
        "dtype": str(patches.dtype).removeprefix("torch."), "text_config": text, "vision_config": vision,
    }  # fmt: skip


def _processor(network: Network) -> dict[str, Any]:
    preprocessing = network.preprocessing
    size = preprocessing["size"]
    squash = preprocessing["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor",
        "do_convert_rgb": True, "do_resize": True, "resample": _RESAMPLE[preprocessing["interpolation"]],
        "size": {"height": size, "width": size} if squash else {"shortest_edge": size},
        "do_center_crop": not squash, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": preprocessing["mean"], "image_std": preprocessing["std"],
    }  # fmt: skip


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return CLIP's vocabulary with its two special tokens under the names that transformers gives them."""
    names = dict(zip(sorted(tokenizer.all_special_ids), (_START, _END), strict=True))
    return {names.get(index, word): index for word, index in tokenizer.encoder.items()}
