"""Describe what a model computes besides its weights: activations, preprocessing, context length, tokenizer.

The same weights under GELU and under QuickGELU are two models; so they are with images of another size, mean or resize mode. An
adapter carries the description of the model that it was trained on, and `fastlora.load` compares.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GELU", "KEY", "PREPROCESSING", "QUICK_GELU", "Network", "activation_name"]

GELU, QUICK_GELU = "gelu", "quick_gelu"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    GELU: F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
# What open_clip, OpenAI and transformers call their towers.
_TOWERS = {"transformer": "text", "text": "text", "text_model": "text", "visual": "vision", "vision_model": "vision"}
# Under this key a file's metadata hold the description.
KEY = "fastlora"
# Dropout, Identity and the like have no parameters either: only what is named like an activation is called.
_NAMED_LIKE_ONE = re.compile(r"gelu|relu|silu|swish|mish|sigmoid|tanh|act", re.IGNORECASE)
# GELU and its tanh form differ by 5e-4 here, two implementations of either by rounding.
_SAME = 1e-5
PREPROCESSING = ("size", "mean", "std", "interpolation", "resize_mode")
# The arguments of open_clip's create_model_and_transforms that set what differs.
_OPTIONS = {"size": "force_image_size", "context length": "force_context_length"}
_OPTIONS |= {name: f"image_{name}" for name in PREPROCESSING if name != "size"}
# Ids that any two tokenizers are unlikely to share: case, accents, punctuation, numbers, another script, a rare word.
_PROBES = ["a photo of a Cat.", "naïve café, 1234 & co.", "ПРИВЕТ 你好", "antidisestablishmentarianism"]


@dataclasses.dataclass(frozen=True)
class Network:
    """What a model computes besides its weights. None, or an absent key, is unknown and differs from nothing.

    Args:
        activation: "text" and "vision", or another part of the model (the beginning of a path) -> name of the activation there.
        heads: part -> number of attention heads, which no weight shows.
        preprocessing: of PREPROCESSING: "size" in pixels (a number, or height and width), "mean" and "std" of pixels in [0, 1],
            "interpolation" and "resize_mode" in open_clip's words.
        context_length: tokens of a prompt.
        tokenizer: a digest of the ids that it gives to a few texts.
    """

    activation: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, str] = dataclasses.field(default_factory=dict)
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    context_length: int | None = None
    tokenizer: str | None = None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Callable[[list[str]], Any] | None = None) -> Network:
        """Describe `model`, and `tokenizer`: a function of texts to token ids, as open_clip's and transformers' are."""
        said = _preprocessing(model), _context_length(model), tokenizer and _digest(tokenizer)
        return cls(_activations(model), _heads(model), *said)

    def differences(self, here: Network) -> dict[str, tuple[Any, Any]]:
        """Return what is known of both and differs: name -> (value in self, value in `here`)."""
        ours, theirs = _flat(self), _flat(here)
        return {
            name: (value, theirs[name]) for name, value in ours.items() if name in theirs and not _equal(value, theirs[name])
        }

    def told(self, here: Network) -> str:
        """Return in words what `differences` gives: "activation of vision quick_gelu, here gelu"."""
        return "; ".join(f"{name} {mine}, here {other}" for name, (mine, other) in self.differences(here).items())

    def words(self) -> str:
        """Return all that is known: "activation of text gelu; size 64; …"."""
        return "; ".join(f"{name} {value}" for name, value in _flat(self).items())

    def options_over(self, here: Network) -> dict[str, Any]:
        """Return the arguments of open_clip's create_model_and_transforms that make this network of what is `here` without."""
        options: dict[str, Any] = {}
        for name, (mine, _) in self.differences(here).items():
            if name.startswith("activation"):
                options |= {"force_quick_gelu": True} if mine == QUICK_GELU else {"quick_gelu": False}
            elif name in _OPTIONS:
                options[_OPTIONS[name]] = tuple(mine) if isinstance(mine, list) else mine
        return options

    def metadata(self) -> dict[str, str]:
        """Return the metadata of a safetensors file of this network: one key, as several are written in any order."""
        return {KEY: json.dumps({"network": self.to_dict()})}

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str] | None) -> Network | None:
        """Return the description in a safetensors file's metadata, as `metadata` gives it; None where there is none.

        Raises:
            KeyError, TypeError, ValueError: the metadata are damaged.
        """
        values = json.loads((metadata or {}).get(KEY, "{}"))
        return cls.from_dict(values["network"]) if "network" in values else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as written to an adapter's metadata and to config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Network:
        """Return the description that `to_dict` wrote.

        Raises:
            TypeError: the values are of another kind.
        """
        activation, heads, preprocessing = values["activation"], values["heads"], values["preprocessing"]
        context, tokenizer = values["context_length"], values["tokenizer"]
        right = (
            isinstance(activation, dict)
            and isinstance(heads, dict)
            and isinstance(preprocessing, dict)
            and all(isinstance(name, str) for name in (*activation.values(), *heads.values()))
            and (context is None or isinstance(context, int))
            and (tokenizer is None or isinstance(tokenizer, str))
        )
        if not right:
            raise TypeError("the description of the network is not one that fastlora wrote")
        return cls(activation, heads, preprocessing, context, tokenizer)


def activation_name(module: nn.Module) -> str:
    """Return the name of the function that an activation computes, found by its values; of an unknown one its class."""
    x = torch.linspace(-4, 4, 17, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            y = module.forward(x.clone())
    except Exception:  # not a function of one tensor: its class has to say it
        return type(module).__name__
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return type(module).__name__
    known = (
        name for name, function in _ACTIVATIONS.items() if torch.allclose(function(x), y.float().cpu(), atol=_SAME, rtol=0)
    )
    return next(known, type(module).__name__)


def _activations(model: nn.Module) -> dict[str, str]:
    leaves = {
        path: module
        for path, module in model.named_modules()
        if not (module._modules or module._parameters or module._buffers) and _NAMED_LIKE_ONE.search(type(module).__name__)
    }
    return _by_part({path: activation_name(module) for path, module in leaves.items()})


def _heads(model: nn.Module) -> dict[str, str]:
    found = {}
    for path, module in model.named_modules():
        counts = (getattr(module, name, None) for name in ("num_heads", "num_attention_heads", "n_heads"))
        if (count := next((c for c in counts if isinstance(c, int)), None)) is not None:
            found[path] = str(count)
    return _by_part(found)


def _by_part(found: dict[str, str]) -> dict[str, str]:
    """Return what was found at paths of a model, by the part of it: "8" or "relu+silu"."""
    parts: dict[str, set[str]] = {}
    for path, value in found.items():
        part = path.replace("_orig_mod.", "").partition(".")[0]  # torch.compile's wrapper adds a name of its own
        parts.setdefault(_TOWERS.get(part, part), set()).add(value)
    return {part: "+".join(sorted(values)) for part, values in sorted(parts.items()) if part}


def _preprocessing(model: Any) -> dict[str, Any]:
    """Read it from where open_clip, OpenAI's clip, timm and transformers keep it."""
    visual = getattr(model, "visual", model)
    if isinstance(config := getattr(visual, "preprocess_cfg", None), Mapping):  # open_clip
        return {name: _plain(config[name]) for name in PREPROCESSING if name in config}
    if isinstance(config := getattr(model, "pretrained_cfg", None), Mapping):  # timm
        found = {name: config.get(name) for name in ("mean", "std", "interpolation")} | {"size": _timm_size(model)}
    else:
        vision = getattr(getattr(model, "config", None), "vision_config", getattr(model, "config", None))  # transformers
        sizes = (getattr(visual, name, None) for name in ("image_size", "input_resolution"))
        found = {"size": next((size for size in sizes if size is not None), getattr(vision, "image_size", None))}
        found |= {name: getattr(visual, f"image_{name}", None) for name in ("mean", "std")}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _timm_size(model: Any) -> Any:
    return getattr(getattr(model, "patch_embed", None), "img_size", None)


def _context_length(model: Any) -> int | None:
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", config)
    places = (
        (model, "context_length"),
        (getattr(model, "text", None), "context_length"),
        (text, "max_position_embeddings"),
    )
    found = (getattr(place, name, None) for place, name in places)
    return next((int(length) for length in found if isinstance(length, (int, Tensor))), None)


def _digest(tokenizer: Callable[[list[str]], Any]) -> str:
    ids = tokenizer(_PROBES)
    ids = ids["input_ids"] if isinstance(ids, Mapping) else ids
    rows = ids.tolist() if isinstance(ids, Tensor) else [list(row) for row in ids]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Return JSON's form: lists for tuples, one number for a square size."""
    if isinstance(value, (list, tuple)):
        value = [v.item() if isinstance(v, Tensor) else v for v in value]
        return value[0] if len(value) == 2 and value[0] == value[1] and isinstance(value[0], int) else value
    return value.item() if isinstance(value, Tensor) else value


def _flat(network: Network) -> dict[str, Any]:
    values: dict[str, Any] = {f"activation of {part}": name for part, name in network.activation.items()}
    values |= {f"heads of {part}": count for part, count in network.heads.items()} | dict(network.preprocessing)
    values |= {"context length": network.context_length, "tokenizer": network.tokenizer}
    return {name: value for name, value in values.items() if value is not None}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):  # means and deviations pass through JSON and fp32
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    return bool(a == b)
