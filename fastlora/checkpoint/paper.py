"""lora_weights.pt of the paper's code (CLIP-LoRA, arXiv 2405.18541): a torch file of tensors and plain containers.

{"weights": {"layer_i": {"q_proj" | "k_proj" | "v_proj" | "proj": {"w_lora_A": (R, K), "w_lora_B": (n, R)}}},
 "metadata": {"r", "alpha", "encoder": "text" | "vision" | "both", "params": ["q", "k", "v", "o"], "position": "all", "up", …}}

Layers are numbered over the adapted blocks alone, text tower first. Dropout is not in the file.
"""

from __future__ import annotations

import collections
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import ENCODERS, LAYERS, LoRAConfig
from .files import atomic, plain, read_pickle, readable
from .network import Network
from .parts import ForeignAdapter, Part, Place, parts_of, slots

__all__ = ["read", "write"]

WHAT = "lora_weights.pt of CLIP-LoRA"
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
TARGETS = {name: target for target, name in PROJECTIONS.items()}
_WEIGHTS = ("w_lora_A", "w_lora_B")
# The code of the paper's time left out the last three of the image tower's 24 blocks when asked for all of a ViT-L/14.
_OLD_LARGE = (24, 21)


def write(model: nn.Module, config: LoRAConfig, beside: dict[str, Tensor], network: Network, path: Path) -> None:
    """The adapter as the paper's code saves it, whole or not at all.

    Raises:
        ValueError: what the format cannot say: ranks that differ, MLP targets, blocks that have no name, anything trained
            beside the adapter.
    """
    if beside:
        raise ValueError(f"CLIP-LoRA's file holds nothing beside the adapter: {', '.join(beside)} would be lost")
    if config.rank_pattern:
        raise ValueError("CLIP-LoRA's file has one rank for all layers: this adapter has a rank_pattern")
    if other := set(config.targets) - set(PROJECTIONS):
        raise ValueError(f"CLIP-LoRA's file holds q, k, v and o: this adapter is on {', '.join(sorted(other))} too")
    if not isinstance(config.layers, str):
        raise ValueError(f"CLIP-LoRA's file names blocks by {', '.join(LAYERS)}: this adapter is on blocks {config.layers}")
    layers: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = collections.defaultdict(dict)
    for place, part in parts_of(model).items():
        if place.number:
            raise ValueError(f"CLIP-LoRA's file holds one of each target a block: this adapter has {place}")
        pair = {name: tensor.clone() for name, tensor in zip(_WEIGHTS, (part.a, part.b), strict=True)}
        layers[place.encoder, place.block][PROJECTIONS[place.target]] = pair
    if partial := [place for place, layer in layers.items() if len(layer) < len(config.targets)]:
        raise ValueError(f"CLIP-LoRA's file has the same targets in all layers: {partial[0]} lacks some here")
    encoders = {encoder for encoder, _ in layers}
    values = {
        "weights": {f"layer_{i}": layer for i, layer in enumerate(layers.values())},
        "metadata": {
            "r": config.rank,
            "alpha": config.scale * math.sqrt(config.rank) if config.scaling == "alpha/r" else config.alpha,
            "encoder": "both" if len(encoders) == 2 else encoders.pop(),
            "params": list(config.targets),
            "position": config.layers,
        },
        "network": network.to_dict(),  # of no meaning to the paper's code
    }
    with atomic(path) as temporary:
        torch.save(values, temporary)


def read(path: Path, model: nn.Module) -> ForeignAdapter:
    """The adapter in a lora_weights.pt, its parts placed on `model`; dropout is LoRAConfig's default, the paper's.

    Raises:
        ValueError: not such a file, or one for another model.
    """
    values = read_pickle(path, WHAT)
    with readable(path, f"no {WHAT}"):
        weights, metadata = values["weights"], values["metadata"]
        rank, alpha, position, params = (metadata[key] for key in ("r", "alpha", "position", "params"))
        encoders = ENCODERS if metadata["encoder"] == "both" else (metadata["encoder"],)
        network = Network.from_dict(values["network"]) if "network" in values else None  # where fastlora wrote the file
        config = LoRAConfig(rank=rank, alpha=float(alpha), targets=tuple(params), encoders=encoders, layers=position)
        blocks = _blocks(path, config, model, len(weights))
        parts = {}
        for i, (encoder, block) in enumerate(blocks):
            layer = weights[f"layer_{i}"]
            if set(layer) != {PROJECTIONS[target] for target in config.targets}:
                raise ValueError(f"{path} is damaged: layer_{i} holds {sorted(layer)}, the metadata says {params}")
            for name, pair in layer.items():
                a, b = (plain(path, f"layer_{i} {name} {key}", pair[key]) for key in _WEIGHTS)
                if a.ndim != 2 or a.shape[0] != rank:
                    raise ValueError(
                        f"{path} is damaged: layer_{i} {name} has A {tuple(a.shape)}, the metadata says rank {rank}"
                    )
                parts[Place(encoder, block, TARGETS[name])] = Part(a, b, config.alpha, f"layer_{i} {name}")
    return ForeignAdapter(str(path), parts, "alpha/sqrt(r)", config.dropout, network=network)


def _blocks(path: Path, config: LoRAConfig, model: nn.Module, count: int) -> list[tuple[str, int]]:
    """(encoder, block) of layer_0, layer_1, …

    Raises:
        ValueError: the file has another number of layers than the model's towers give.
    """
    depths: dict[str, int] = {}
    for place in slots(model):
        depths[place.encoder] = max(depths.get(place.encoder, 0), place.block + 1)
    encoders = [encoder for encoder in depths if encoder in config.encoders]  # slots have text first
    here = {encoder: list(config.layer_indices(depths[encoder])) for encoder in encoders}
    old = here | {"vision": list(range(_OLD_LARGE[1]))}
    for blocks in (here, old) if config.layers == "all" and depths.get("vision") == _OLD_LARGE[0] else (here,):
        numbered = [(encoder, block) for encoder, indices in blocks.items() for block in indices]
        if len(numbered) == count:
            return numbered
    wanted = " and ".join(f"{len(indices)} of {encoder}" for encoder, indices in here.items())
    raise ValueError(f"{path} is for another model: it has {count} layers, here {wanted} are adapted")
