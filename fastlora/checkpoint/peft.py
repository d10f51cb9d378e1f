"""PEFT's folder: adapter_config.json beside adapter_model.safetensors (or .bin), as for transformers' CLIPModel.

Written and read with the host's own names where its projections are nn.Linear (transformers, timm), else with those of
transformers' CLIP, whose weights are open_clip's under other names. An adapter that PEFT put on a packed q, k, v has one A for
the three. What was trained beside the adapter is in PEFT's modules_to_save, under the host's own names.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..beside import Kept, host_state
from ..config import LoRAConfig
from .files import atomic, open_safetensors, plain, read_pickle, readable, write_safetensors
from .network import Network
from .parts import ForeignAdapter, Part, Place, Scaling, parts_of, slots

__all__ = ["CONFIG", "read", "write"]

CONFIG, WEIGHTS, OLD_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MODULES = {f"self_attn.{name}_proj": target for name, target in zip(("q", "k", "v", "out"), "qkvo", strict=True)}
MODULES |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"}
NAMES = {target: module for module, target in MODULES.items()}
_CLIP_NAME = re.compile(rf"(text|vision)_model\.(?:encoder\.)?layers\.(\d+)\.({'|'.join(map(re.escape, MODULES))})")
# What changes no output of a LoRA that is loaded, or is read here; any other option that is set means another method.
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def write(model: nn.Module, config: LoRAConfig, beside: dict[str, Tensor], network: Network, path: Path) -> None:
    """A folder that PeftModel.from_pretrained puts on the same model, or, where PEFT has no name for a host's projections
    (nn.MultiheadAttention), on transformers' CLIPModel with the same weights. Each file is written whole or not at all.

    Raises:
        ValueError: an adapter on a module that CLIPModel does not have, or what PEFT cannot save beside an adapter.
    """
    parts, where = parts_of(model), slots(model)
    translated = any(slot.linear is None for slot in where.values())
    if translated and (gated := [where[place].path for place in parts if place.number]):
        raise ValueError(f"PEFT's file has the names of transformers' CLIPModel, which has no gated MLP as at {gated[0]}")
    by_name: dict[str, list[Place]] = {}
    for place in parts:
        clip = f"{place.encoder}_model.encoder.layers.{place.block}.{NAMES[place.target]}"
        by_name.setdefault(clip if translated else str(where[place].linear), []).append(place)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, places in by_name.items():
        pieces = [parts[place] for place in places]
        groups = [place for place, slot in where.items() if not translated and slot.linear == name] or places
        n, rank = pieces[0].b.shape
        # q, k and v packed in one nn.Linear: PEFT has one A for all rows, so theirs are stacked and each B takes its own
        b = torch.zeros(n * len(groups), rank * len(places), dtype=torch.float32)
        for i, place in enumerate(places):
            row = groups.index(place)
            b[row * n : (row + 1) * n, i * rank : (i + 1) * rank] = pieces[i].b
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.cat([piece.a for piece in pieces])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        ranks[name] = rank * len(places)
        root = config.scaling == "alpha/sqrt(r)"
        alphas[name] = config.alpha * (math.sqrt(len(places)) if root else len(places))
    modules, extra = _whole_modules(model, beside, set(ranks)) if beside else ([], {})
    tensors |= {PREFIX + name: tensor for name, tensor in extra.items()}
    values = {
        "peft_type": "LORA",
        "r": config.rank,
        "lora_alpha": config.alpha,
        "use_rslora": config.scaling == "alpha/sqrt(r)",
        "lora_dropout": config.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != config.alpha},
        "bias": "none",
        "modules_to_save": modules or None,
        "inference_mode": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / WEIGHTS, tensors, network.metadata())
    with atomic(path / CONFIG) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, model: nn.Module) -> ForeignAdapter:
    """The adapter in a PEFT folder, its parts placed on `model`. No file but those named above is opened.

    Raises:
        ValueError: not such a folder, a PEFT method other than plain LoRA, or a module that the model does not have.
    """
    config, network = _config(folder / CONFIG), None
    if (folder / WEIGHTS).is_file():
        with open_safetensors(folder / WEIGHTS, "PEFT adapter") as file:
            saved = _saved(folder, set(file.keys()), model, config)
            modules = _modules(folder, set(file.keys()) - saved, model)
            with readable(folder, "no readable PEFT adapter"):
                network = Network.of_metadata(file.metadata())  # where fastlora wrote the folder
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    elif (folder / OLD_WEIGHTS).is_file():
        tensors = read_pickle(folder / OLD_WEIGHTS, "PEFT adapter")
        if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise ValueError(f"{folder / OLD_WEIGHTS} is no PEFT adapter: it holds more than tensors by name")
        saved = _saved(folder, set(tensors), model, config)
        modules = _modules(folder, set(tensors) - saved, model)
    else:
        raise ValueError(f"{folder} has {CONFIG}, but no {WEIGHTS} or {OLD_WEIGHTS} beside it")
    parts = {}
    for module, places in modules.items():
        names = (f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB")
        a, b = (plain(folder, name, tensors[name]) for name in names)
        rank = _for_module(config["rank_pattern"], module, config["r"])
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[0] % len(places):
            raise ValueError(
                f"{folder} is damaged: {module} has A {tuple(a.shape)} and B {tuple(b.shape)}, the config says rank {rank}"
            )
        alpha = _for_module(config["alpha_pattern"], module, config["lora_alpha"]) * _times(folder, config, module)
        for place, rows in zip(places, b.chunk(len(places)), strict=True):
            parts[place] = Part(a, rows, alpha, module)
    here = host_state(model)
    beside = {
        (own := name.removeprefix(PREFIX)): Kept(tensors[name], isinstance(here.get(own), nn.Parameter))
        for name in sorted(saved)
    }
    scaling: Scaling = "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"
    return ForeignAdapter(str(folder), parts, scaling, config["lora_dropout"], beside, network)


def _config(path: Path) -> dict[str, Any]:
    """adapter_config.json with PEFT's defaults filled in and checked to be a plain LoRA's."""
    defaults: dict[str, Any] = {
        "peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none",
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True, "inference_mode": True,
        "modules_to_save": [],
    }  # fmt: skip
    with readable(path, "not a readable PEFT config"):
        given = json.loads(path.read_text(encoding="utf-8"))
        config = defaults | {key: value for key, value in given.items() if value is not None}
        if config["peft_type"] != "LORA":
            raise ValueError(f"{path}: peft_type is {config['peft_type']}, only LORA can be loaded")
        # PiSSA, OLoRA and their like change the base's weights too
        if config["init_lora_weights"] not in (True, False, "gaussian", "orthogonal"):
            raise ValueError(
                f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base, which cannot be loaded"
            )
        for key, value in config.items():
            if value and key not in _HARMLESS and (key, value) != ("bias", "none"):
                raise ValueError(f"{path}: {key} = {value!r} is not plain LoRA, which is all that can be loaded")
        numbers = [config[key] for key in ("r", "lora_alpha", "lora_dropout")]
        for key in ("rank_pattern", "alpha_pattern"):
            numbers += config[key].values()
            config[key] = {re.compile(rf"(?:.*\.)?(?:{name})"): value for name, value in config[key].items()}
        if wrong := [value for value in numbers if isinstance(value, bool) or not isinstance(value, (int, float))]:
            raise TypeError(f"{wrong[0]!r} is no number")
        for number in numbers:
            float(number)  # OverflowError
        if not all(isinstance(name, str) and name for name in config["modules_to_save"]):
            raise TypeError(f"modules_to_save is {config['modules_to_save']!r}, no list of names")
    return config


def _for_module(pattern: dict[re.Pattern[str], Any], module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first expression that fits the end of a module's name decides."""
    return next((value for fits, value in pattern.items() if fits.fullmatch(module)), otherwise)


def _times(folder: Path, config: dict[str, Any], module: str) -> int:
    """How often PEFT adds a module's update: the out_proj inside nn.MultiheadAttention twice, which is what was trained.

    Seen in 0.21 by its outputs; a later version may have put it right, so what it means there is not guessed.
    """
    if not module.endswith(".base_layer.out_proj"):
        return 1
    version = re.match(r"0\.(\d+)\.", str(config.get("peft_version", "0.21.")))
    if version is None or int(version[1]) > 21:
        raise ValueError(
            f"{folder}: {module} is of PEFT {config['peft_version']}; up to 0.21 its update counts twice, there unknown"
        )
    return 2


def _saved(folder: Path, names: set[str], model: nn.Module, config: dict[str, Any]) -> set[str]:
    """Those of `names` that belong to PEFT's modules_to_save, which are trained and saved as a whole.

    Raises:
        ValueError: the file holds nothing of them, or not all that the model has there.
    """
    endings = config["modules_to_save"]
    saved = {name for name in names if name.startswith(PREFIX) and _belongs(name.removeprefix(PREFIX), endings)}
    missing = {PREFIX + name for name in host_state(model) if _belongs(name, endings)} - saved
    if missing or (endings and not saved):
        what = min(missing) if missing else "anything of them"
        raise ValueError(f"{folder} is damaged: its config has modules_to_save {endings}, and the file lacks {what}")
    return saved


def _whole_modules(model: nn.Module, beside: dict[str, Tensor], linears: set[str]) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that hold what was trained beside the adapter, and all their tensors: PEFT saves no less.

    Args:
        linears: what the adapter is on, as PEFT names it.

    Raises:
        ValueError: what PEFT cannot save so, by its name.
    """
    state = host_state(model)
    owners = {name.rpartition(".")[0] for name in beside}
    endings = sorted(owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners))
    for name in beside:
        owner, why = name.rpartition(".")[0], None
        if not linears <= {key.rpartition(".")[0] for key in state}:
            why = "the adapter has the names of transformers' CLIPModel, which has no such parameter"
        elif not owner:
            why = "PEFT saves whole modules, and this is a parameter of the model itself"
        elif held := [linear for linear in linears if f"{linear}.".startswith(f"{owner}.")]:
            why = f"PEFT saves whole modules, and {held[0]} has an adapter"
        if why:
            raise ValueError(f"PEFT's folder cannot hold {name}, which was trained beside the adapter: {why}")
    return endings, {name: beside.get(name, tensor) for name, tensor in state.items() if _belongs(name, endings)}


def _belongs(name: str, endings: list[str]) -> bool:
    """PEFT's rule for modules_to_save: every module whose path ends so, with all that is in it."""
    return any(name[: dot.start()].endswith(tuple(endings)) for dot in re.finditer(r"\.", name))


def _modules(folder: Path, names: set[str], model: nn.Module) -> dict[str, list[Place]]:
    """The adapted modules by PEFT's name, with the places each one covers: one, or the three of a packed q, k, v.

    Raises:
        ValueError: a tensor that is no half of a pair, or a module that the model does not have.
    """
    where = slots(model)
    own: dict[str, list[Place]] = {}
    for place, slot in where.items():
        own.setdefault(slot.linear or slot.path, []).append(place)
    modules = {}
    for name in sorted(names):
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise ValueError(f"{folder} holds {name}, which is not part of a LoRA on linear layers ({len(names)} tensors)")
        module, letter = match.groups()
        if (other := f"{PREFIX}{module}.lora_{'B' if letter == 'A' else 'A'}.weight") not in names:
            raise ValueError(f"{folder} is damaged: it holds {name} and lacks {other}")
        if (path := module.replace(".base_layer.", ".")) in own:  # PEFT wraps an attention around its out_proj
            modules[module] = own[path]
        elif (clip := _CLIP_NAME.fullmatch(module)) is not None:
            modules[module] = [Place(clip[1], int(clip[2]), MODULES[clip[3]])]
        if module not in modules or not set(modules[module]) <= set(where):
            raise ValueError(f"{folder} is for another model: it adapts {module}, which this one does not have")
    if not modules:
        raise ValueError(f"{folder} holds no adapter")
    return modules
