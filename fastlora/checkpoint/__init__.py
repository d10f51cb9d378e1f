"""Adapters in and out: fastlora's own safetensors, PEFT's folder, the paper's lora_weights.pt. No code in a file is run."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ..adapters import bring, check_places, set_adapter, using
from ..beside import Kept, host_state, trained, whole
from ..config import LoRAConfig
from ..layers import DEFAULT
from ..patch import check_new, install, unmerge
from ..plan import Plan, plan
from ..record import PatchReport, lora_layers, originals, parameters_of, patched, record_of, report_of
from . import merged, native, paper, peft
from .files import FLOATS, one_line, plain
from .network import Network

__all__ = ["load", "save"]

Format = Literal["fastlora", "peft", "clip-lora", "merged"]


Tokenizer = Callable[[list[str]], Any]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: Format = "fastlora",
    adapter: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write an adapter of a patched model, or the model with it merged in; whole or not at all.

    What was trained beside the adapter is written with it: every other parameter that requires a gradient (a head, logit_scale,
    norms, a module of your own), with the buffers of its module. So is a parameter or buffer that no longer has the value that
    `patch` found, such as a head that was frozen again after training or the running statistics of a frozen tower; where a
    checkpoint (or a cast to half and back) changed the weights under the adapters too, that can't be told, and only what
    requires a gradient is written. What is trained beside adapters on this model is written with each of them; what `load`
    brought, with the one it came with.

    Of a model that is sharded over processes (fully_shard) all of them must call: what they hold is gathered.

    Args:
        path: a file; a folder for "peft".
        format: "fastlora": one safetensors file, `<module path>.lora_A` (g, R, K) and `.lora_B` (g · N/G, R) in fp32, what was
            trained beside them under its own name; in its metadata the LoRAConfig, and a few values of each base weight, by
            which `load` knows the base again.
            "peft": adapter_config.json and adapter_model.safetensors for transformers' CLIPModel with the same weights; what
            was trained beside them as PEFT's modules_to_save, so whole modules only.
            "clip-lora": the lora_weights.pt of the paper's code; q, k, v, o and one rank only, nothing beside them.
            "merged": a checkpoint of the plain model that has the adapter in its weights: the file that open_clip's
            `create_model(..., pretrained=FILE)` takes, a folder for `from_pretrained` if the model is transformers'.
        adapter: the name of one; default: the active one.
        tokenizer: texts -> token ids, as open_clip's and transformers' are; a digest of it is kept, by which `load` knows it
            again. What else the model computes besides its weights (activation, preprocessing, context length) is kept anyway,
            as far as the model knows it.

    Raises:
        ValueError: the model is not patched, there is no such adapter, the format is unknown or cannot hold this adapter.
        OSError: the file cannot be written.
    """
    if format not in get_args(Format):
        raise ValueError(f"unknown format {format!r}: choose from {', '.join(get_args(Format))}")
    record = patched(model)
    name = record.active if adapter is None else adapter
    if name not in record.configs:
        raise ValueError(f"no adapter is called {name!r}: there are {', '.join(record.configs)}")
    with using(model, name), torch.device("cpu"):
        config, beside, network = record.configs[name], trained(model, record.marks), Network.of(model, tokenizer)
        if format == "merged":
            merged.write(model, Path(path), network=network)
        elif format == "fastlora":
            parameters = parameters_of(dict(lora_layers(model)), name)
            tensors = {key: whole(p).float() for key, p in parameters.items()}
            native.write(model, config, tensors, beside, network, Path(path))
        else:
            (peft if format == "peft" else paper).write(model, config, beside, network, Path(path))


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter: str = DEFAULT,
    check_base: bool = True,
    tokenizer: Tokenizer | None = None,
) -> PatchReport:
    """Put an adapter from a file on `model` and make it the active one.

    What is given is recognised: a safetensors file that `save` wrote, the folder of a PEFT adapter for transformers' CLIP, a
    lora_weights.pt of the paper's code. The model is patched with the file's config; where it has an adapter of that name and
    config, that one gets the values. The file is checked as a whole before the model is touched: after an error the model is as
    it was. Pickles are read by torch's weights-only reader: tensors and plain containers, no code.

    What was trained beside the adapter takes its place in the model, and requires a gradient where it did when it was saved, so
    that training can go on: give it to the optimizer again. It comes and goes with this adapter (`set_adapter`, `disabled`,
    `delete_adapter`), and `unpatch` puts back what stood there before.

    Args:
        adapter: its name on the model.
        check_base: refuse an adapter that was trained on other base weights (fastlora's own files know theirs), or on another
            network: another activation, preprocessing, context length or tokenizer. What either side does not know is not
            compared. A file of an earlier version does not know its network, which is warned of.
        tokenizer: as for `save`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an adapter, a damaged one, or one for another model, rank, config, base or head; says what differs.
        OSError: the file cannot be read.
    """
    path, record = Path(path), record_of(model)
    there = None if record is None else record.configs.get(adapter)
    # first all that can fail; what is read and made anew is on the CPU, whatever device the caller has chosen
    with one_line(), torch.device("cpu"):
        source = _open(path, model)
        config = source.config(model, there)
        if there is None:
            check_new(model, adapter)
        else:
            _check_same(path, adapter, config, there)
            check_places(model)
        planned = plan(model, config, originals(model))
        parameters = None if there is None else parameters_of(dict(lora_layers(model)), adapter)
        values = _values(path, planned, source.tensors(model, planned), parameters)
        beside = _beside(path, host_state(model), source.beside)
        if check_base:
            source.check_base(model, planned)
            _check_network(path, source, model, tokenizer)
    if parameters is None:
        install(model, adapter, planned, values)
    else:
        unmerge(model)
        set_adapter(model, adapter)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
    bring(model, adapter, beside)
    return report_of(model)


class Source(Protocol):
    """An adapter that was found in a file, in any format."""

    @property
    def network(self) -> Network | None:
        """What it was trained on, where the file says so."""

    @property
    def beside(self) -> dict[str, Kept]:
        """What was trained beside the adapter, by its name in the model."""

    def config(self, model: nn.Module, patched: LoRAConfig | None) -> LoRAConfig:
        """How to patch the model for it; `patched`: how it is patched now."""

    def tensors(self, model: nn.Module, plan: Plan) -> dict[str, Tensor]:
        """What the planned parameters should hold, by the names in `plan.shapes`; ValueError if it is not all or more."""

    def check_base(self, model: nn.Module, plan: Plan) -> None:
        """Raise ValueError where the base is known to be another. The model is not touched yet."""


def _open(path: Path, model: nn.Module) -> Source:
    if path.is_dir():
        if not (path / peft.CONFIG).is_file():
            raise ValueError(f"{path} is a folder without {peft.CONFIG}: give a PEFT adapter's folder, or a file")
        return peft.read(path, model)
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    with path.open("rb") as file:
        head = file.read(9)
    # a zip, as torch.save writes, or a bare pickle of protocol 2 and above, as it did before; safetensors has 8 bytes of length
    # which may be any, and JSON
    if head.startswith((b"PK\x03\x04", b"\x80")) and head[8:] != b"{" and path.suffix != ".safetensors":
        return paper.read(path, model)
    return native.NativeFile(path)


def _check_same(path: Path, adapter: str, saved: LoRAConfig, here: LoRAConfig) -> None:
    """Raise ValueError where an adapter that is there has another config than the file's."""
    names = [field.name for field in dataclasses.fields(saved) if getattr(saved, field.name) != getattr(here, field.name)]
    if names:
        a, b = (", ".join(f"{name}={getattr(config, name)!r}" for name in names) for config in (saved, here))
        raise ValueError(f"{path} was saved with {a}, the model's {adapter!r} has {b}: unpatch it first, or give another name")


def _check_network(path: Path, source: Source, model: nn.Module, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError where the file is of another network than the model is; warn where an old file does not say."""
    here = Network.of(model, tokenizer)
    if source.network is None:
        if isinstance(source, native.NativeFile):
            warnings.warn(
                f"{path} was saved by an earlier version, which did not keep the network: assumed is this model's"
                f" ({here.words()}). Where that is right, fastlora.save(model, {str(path)!r}) writes it anew",
                stacklevel=3,
            )
        return
    if told := source.network.told(here):
        options = ", ".join(f"{name}={value!r}" for name, value in source.network.options_over(here).items())
        mend = f"build it with open_clip.create_model_and_transforms(..., {options})"
        if not options or not type(model).__module__.startswith("open_clip"):
            mend = "give it the model that it was trained on"
        raise ValueError(f"{path} was trained on another network: {told}; {mend}, or pass check_base=False")


def _values(
    path: Path, plan: Plan, tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter] | None
) -> dict[str, Tensor]:
    """The tensors as the adapter's parameters will hold them, with memory of their own.

    Args:
        parameters: those that are there already.
    """
    if parameters is not None and (odd := sorted(set(parameters) ^ set(plan.shapes))):
        raise ValueError(f"the model's adapter is not where its config puts it ({odd[0]}): unpatch the model first")
    values = {}
    for key, shape in plan.shapes.items():
        base = plan.modules[key.rpartition(".")[0]].base[0]
        device, dtype = (base.device, torch.float32) if parameters is None else (parameters[key].device, parameters[key].dtype)
        tensor = plain(path, key, tensors[key])
        if tensor.shape != shape:
            raise ValueError(f"{path} is for another model: {key} is {tuple(tensor.shape)}, here {shape}")
        values[key] = _put(path, key, tensor, device, dtype)
    return values


def _beside(path: Path, state: dict[str, Tensor], found: dict[str, Kept]) -> dict[str, Kept]:
    """What was trained beside the adapter as the model will hold it; `state` is what it holds now."""
    values: dict[str, Kept] = {}
    first: dict[int, str] = {}
    for key, kept in found.items():
        if (here := state.get(key)) is None:
            raise ValueError(f"{path} is for another model: {key} was trained beside the adapter, and this one has no {key}")
        if here.shape != kept.value.shape:
            raise ValueError(
                f"{path} is for another model: {key}, trained beside the adapter, is {tuple(kept.value.shape)}, here"
                f" {tuple(here.shape)}"
            )
        if here.dtype in FLOATS:
            tensor = _put(path, key, plain(path, key, kept.value), here.device, here.dtype)
        elif here.dtype != kept.value.dtype:
            raise ValueError(f"{path} is for another model: {key} is {kept.value.dtype}, here {here.dtype}")
        else:
            tensor = kept.value.to(here.device, copy=True)
        name = first.setdefault(id(here), key)
        if name == key:
            values[key] = Kept(tensor, kept.trained)
        elif not torch.equal(values[name].value, tensor):
            raise ValueError(f"{path} is for another model: {name} and {key} differ, and are one parameter here")
    return values


def _put(path: Path, key: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A copy with memory of its own on a parameter's device and in its dtype."""
    if device.type == "meta":
        raise ValueError(f"the model's weights under {key} are on the meta device and would lose the values: load them first")
    copy = tensor.to(device, dtype, copy=True)
    if not copy.isfinite().all():
        kind = "" if dtype == torch.float32 else f", at least in {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"{path} is damaged: {key} holds NaN or infinite values{kind}")
    return copy
