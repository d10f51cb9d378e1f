"""Find out what a file of weights needs: a checkpoint is numbers, and the network they belong to has to come from somewhere.

Asked in this order: the file itself (an export of fastlora, or the code in OpenAI's TorchScript archive), an
open_clip_config.json beside it, the tags that open_clip knows for the model.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.files import open_safetensors
from ..checkpoint.network import KEY, PREPROCESSING, QUICK_GELU, Network
from .errors import UserError

__all__ = ["WeightsFile", "recognise", "scripted_state"]

CONFIG = "open_clip_config.json"
# What OpenAI's archives, and traced models, hold beside weights.
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")


@dataclasses.dataclass(frozen=True)
class WeightsFile:
    """What a file, or what lies beside it, says of its network; None where nothing does.

    Args:
        scripted: whether it is a TorchScript archive, as OpenAI's download is.
        quick_gelu: whether it was trained with QuickGELU.
        network: what else it says of its network.
    """

    scripted: bool = False
    quick_gelu: bool | None = None
    network: Network | None = None


def recognise(path: Path) -> WeightsFile:
    """Read what the file at `path` says, without its weights.

    Raises:
        UserError: it cannot be read, or the config beside it cannot.
    """
    if (code := _code(path)) is not None:
        # the class of the activation has its name there; a constant may stand elsewhere in the archive
        quick = True if "QuickGELU" in code or "1.702" in code else False if "gelu(" in code else None
        return WeightsFile(True, quick)
    if (network := _exported(path)) is not None:
        return WeightsFile(False, QUICK_GELU in network.activation.values(), network)
    # the hub's cache links to files whose names are digests
    places = (path.with_name(CONFIG), path.resolve().with_name(CONFIG))
    beside = next((place for place in places if place.is_file()), None)
    if beside is None:
        return WeightsFile()
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        model = config["model_cfg"]
        preprocessing = {name: value for name, value in config.get("preprocess_cfg", {}).items() if name in PREPROCESSING}
        network = Network(preprocessing=preprocessing, context_length=model.get("text_cfg", {}).get("context_length"))
        return WeightsFile(False, bool(model.get("quick_gelu")), network)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{beside} lies beside the weights and is not open_clip's config of a model: {error!r}") from error


def scripted_state(path: Path) -> dict[str, Tensor]:
    """Return the weights in a TorchScript archive, fp32."""
    with warnings.catch_warnings():  # TorchScript is deprecated; OpenAI's files are what they are
        warnings.simplefilter("ignore")
        state = torch.jit.load(path, map_location="cpu").state_dict()
    plain = {name: tensor for name, tensor in state.items() if name not in _NO_WEIGHTS}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in plain.items()}


def _code(path: Path) -> str | None:
    """Return the TorchScript code in an archive; None for any other file."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        sources = [name for name in archive.namelist() if "/code/" in name and name.endswith(".py")]
        return "\n".join(archive.read(name).decode("utf-8", "replace") for name in sources) if sources else None


def _exported(path: Path) -> Network | None:
    """Return what `fastlora.save(..., format="merged")` wrote of the network; None in any other file."""
    try:
        if path.suffix == ".safetensors":
            with open_safetensors(path, "safetensors file") as file:
                return Network.of_metadata(file.metadata())
        elif zipfile.is_zipfile(path):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(KEY)
            return Network.from_dict(values["network"]) if values else None
        return None
    except ValueError as error:
        raise UserError(str(error)) from error
    except Exception:  # torch raises many types on what it cannot read; whoever loads the weights tells what is wrong
        return None
