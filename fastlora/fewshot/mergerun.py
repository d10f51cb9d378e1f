"""`fastlora merge`: the model that a run adapted, as a checkpoint that loads by itself."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..checkpoint import clip_folder, merged
from ..checkpoint.files import atomic_folder
from ..checkpoint.network import GELU, QUICK_GELU, Network
from ..patch import unpatch
from ..record import merge_report_of
from . import models
from .errors import UserError
from .evalrun import adapt, finished, loaded_for
from .recipe import templates
from .runfolder import RunFolder, write_json

__all__ = ["CLASSES", "DTYPES", "FORMS", "run"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = ("open_clip", "transformers")
CLASSES = "classes.json"
# Features of unit length that two implementations of one network give in fp32 differ by less, by a hundred times and more.
CLOSE = 1e-4


def run(folder: RunFolder, out: Path, dtype: str, console: Console, form: str | None = None) -> None:
    """Write the merged model of `folder`, a finished run by LoRA, to `out`, whole or not at all, and print how to load it.

    Args:
        out: a folder to make (open_clip's local-dir form and, for a plain CLIP, that of transformers), or a file of weights
            alone, told by its ending: .safetensors, .pt, .pth or .bin.
        dtype: "fp32", "fp16" or "bf16".
        form: of a folder: one of FORMS, or None for both where both can hold the model.

    Raises:
        UserError: a run of another method or not finished, a form that cannot hold the model, an `out` that cannot be written,
            a checkpoint that would be another network than the one trained.
    """
    for name, value, known in (("dtype", dtype, tuple(DTYPES)), ("form", form or FORMS[0], FORMS)):
        if value not in known:
            raise UserError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    config, recipe = finished(folder)
    if recipe.method != "lora":
        raise UserError(f"the run in {folder.path} was trained by {recipe.method}: there is no adapter to merge")
    if out.exists():
        raise UserError(f"--out {out} is there already: choose another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.suffix and out.suffix not in merged.ENDINGS:
        files = ", ".join(merged.ENDINGS)
        raise UserError(f"--out {out}: merge does not write {out.suffix} files; give a folder, or a file of weights ({files})")
    if out.suffix and form is not None:
        raise UserError(f"--form {form} is of a folder, and --out {out} a file: leave one of the two out")
    loaded = loaded_for(config, recipe, torch.device("cpu"), console)
    adapt(loaded.model, recipe, folder, loaded.tokenizer)
    console.print(f"adding the update to {recipe.model}", highlight=False)
    if out.suffix:
        report = merged.write(loaded.model, out, DTYPES[dtype], loaded.network)
        lines = ["load it with", *(f"    {line}" for line in _file_lines(recipe.model, out.resolve(), loaded))]
    else:
        report = merge_report_of(loaded.model, DTYPES[dtype])
        lines = _write_folder(loaded, out, DTYPES[dtype], config, form, console)
    console.print(str(report), soft_wrap=True, highlight=False)
    console.print(f"checkpoint: {out.resolve()}", soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _write_folder(
    loaded: models.LoadedModel, out: Path, dtype: torch.dtype, config: dict[str, Any], form: str | None, console: Console
) -> list[str]:
    """Write the folder, hold it against the model that was trained, and return the lines that load it."""
    model, network, tokenizer = loaded.model, loaded.network, loaded.tokenizer
    state = merged.plain_state(model, dtype)
    why = clip_folder.refusal(model, state, network, tokenizer)
    if why is not None and form == "transformers":
        raise UserError(f"--form transformers cannot hold this model: {why}")
    forms = [form] if form else [name for name in FORMS if name == "open_clip" or why is None]
    if why is not None and form is None:
        console.print(f"in open_clip's form alone: {why}", soft_wrap=True, highlight=False, markup=False)
    unpatch(model)
    model.load_state_dict(state)  # rounded to the file's dtype, computed in the model's
    with atomic_folder(out) as temporary:
        if "open_clip" in forms:
            clip_folder.write_open_clip(temporary, state, loaded.architecture, network, tokenizer)
        if "transformers" in forms:
            clip_folder.write_transformers(temporary, model, state, network, tokenizer)
        write_json(temporary / CLASSES, {"classes": config["classes"], "template": config["template"]})
        prompts = [t.format(name) for name in config["classes"][:8] for t in templates(config["template"])]
        for name in forms:
            if name == "transformers" and importlib.util.find_spec("transformers") is None:
                console.print("not held against the trained model: transformers is not installed", highlight=False)
                continue
            far = _distance(loaded, prompts, LOADERS[name](temporary, prompts, network))
            if not far <= CLOSE:
                raise UserError(f"as {name} loads it the model would be another: its features differ by {far:.1e}")
            console.print(f"{name} loads it; features of length 1 differ by {far:.0e} at most", highlight=False)
    where = str(out.resolve())
    local = f"local-dir:{where}"
    lines = {
        "open_clip": [
            "load it in open_clip with",
            f"    model, _, preprocess = open_clip.create_model_and_transforms({local!r})",
            f"    tokenizer = open_clip.get_tokenizer({local!r})",
        ],
        "transformers": [
            "load it in transformers with",
            f"    model = transformers.CLIPModel.from_pretrained({where!r})",
            f"    processor = transformers.CLIPProcessor.from_pretrained({where!r})",
        ],
    }
    return [line for name in forms for line in lines[name]]


Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]


def _open_clip(folder: Path, prompts: list[str], network: Network) -> Encoder:
    """Return images -> features of the images and of `prompts`, by open_clip alone.

    Raises:
        UserError: activation, preprocessing, context length or tokenizer are not those of `network`.
    """
    import open_clip

    name = f"local-dir:{folder}"
    with models.quiet():
        plain, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    if told := network.told(Network.of(plain, tokenizer)):
        raise UserError(f"as open_clip loads it the model would be another: {told}")
    return lambda images: (plain.encode_image(images), plain.encode_text(tokenizer(prompts)))


def _transformers(folder: Path, prompts: list[str], network: Network) -> Encoder:
    """As `_open_clip`, by transformers alone; what is tokenised and computed otherwise shows in the features."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with models.quiet():
            plain, tokenizer = CLIPModel.from_pretrained(folder).eval().float(), CLIPTokenizer.from_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    tokens = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")

    def encode(images: Tensor) -> tuple[Tensor, Tensor]:
        image, text = plain.get_image_features(pixel_values=images), plain.get_text_features(**tokens)
        return getattr(image, "pooler_output", image), getattr(text, "pooler_output", text)

    return encode


LOADERS: dict[str, Callable[[Path, list[str], Network], Encoder]] = {"open_clip": _open_clip, "transformers": _transformers}


@torch.no_grad()
def _distance(loaded: models.LoadedModel, prompts: list[str], encode: Encoder) -> float:
    """Return the largest difference of unit features, of noise as images and of `prompts`, from those of the model itself."""
    images = torch.randn(4, 3, loaded.size, loaded.size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    own = loaded.model.encode_image(images), loaded.model.encode_text(loaded.tokenizer(prompts))
    unit = torch.nn.functional.normalize
    return max(float((unit(a, dim=-1) - unit(b, dim=-1)).abs().max()) for a, b in zip(own, encode(images), strict=True))


def _file_lines(name: str, path: Path, loaded: models.LoadedModel) -> list[str]:
    """Return the lines that build the network around a file of weights."""
    if name == models.MINI:
        return ["model = fastlora.mini.build()", f"open_clip.load_checkpoint(model, {str(path)!r})"]
    if name.startswith(models.SCHEMAS):  # they bring weights of their own, and open_clip reads no others beside them
        where = name.removeprefix("local-dir:")
        whole = f"local-dir:{Path(where).resolve()}" if where != name else name
        build = f"model, _, preprocess = open_clip.create_model_and_transforms({whole!r})"
        return [build, f"open_clip.load_checkpoint(model, {str(path)!r})"]
    options = loaded.network.options_over(_as_built(loaded.architecture, loaded.network))
    more = "".join(f", {key}={value!r}" for key, value in options.items())
    return [f"model, _, preprocess = open_clip.create_model_and_transforms({name!r}, pretrained={str(path)!r}{more})"]


def _as_built(architecture: dict[str, Any], network: Network) -> Network:
    """Return the network that open_clip builds from `architecture` around a file that says nothing."""
    from open_clip.transform import PreprocessCfg

    own = QUICK_GELU if architecture.get("quick_gelu") else GELU
    activation = {part: own if name in (QUICK_GELU, GELU) else name for part, name in network.activation.items()}
    size = architecture.get("vision_cfg", {}).get("image_size", network.preprocessing.get("size"))
    preprocessing = dataclasses.asdict(PreprocessCfg(size=size))
    context = architecture.get("text_cfg", {}).get("context_length", network.context_length)
    return Network(activation, {}, {key: preprocessing[key] for key in network.preprocessing}, context)
