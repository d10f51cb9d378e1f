"""Models by name: open_clip's, a local checkpoint, or the mini CLIP. Names are checked before anything is built."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..beside import sample
from ..checkpoint.network import PREPROCESSING, Network
from ..config import LoRAConfig
from .errors import UserError
from .images import Framing
from .recipe import Recipe
from .weights import WeightsFile, recognise, scripted_state

__all__ = ["MINI", "LoadedModel", "check", "check_adapter", "check_same", "load", "quiet"]

MINI = "mini"
SCHEMAS = ("hf-hub:", "local-dir:")
DEFAULT = Recipe.pretrained  # what a user who names none gets
TWIN = "-quickgelu"  # how open_clip names the config of a model with the other activation


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and what its inputs look like.

    Args:
        tokenizer: texts -> token ids, int64 (n, context length).
        framing: how a test image becomes square.
        mean, std: of pixels in [0, 1], per channel.
        network: all of that in one description, to be kept with what is trained.
        weights: a digest by which the weights are known again.
        architecture: the model's config in open_clip's words.
        notes: what had to be assumed, one line each.
    """

    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    framing: Framing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    network: Network = dataclasses.field(default_factory=Network)
    weights: str = ""
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """The side of an image in pixels."""
        return self.framing.size

    def tokenise(self, templates: Sequence[str], classes: Sequence[str]) -> Tensor:
        """The prompts of each class, int64 (classes, templates, length), on the CPU."""
        tokens = self.tokenizer([template.format(name) for name in classes for template in templates])
        return tokens.view(len(classes), len(templates), -1)


def check(name: str, pretrained: str | None, quick_gelu: bool | None = None, *, assume: bool = False) -> dict[str, Any] | None:
    """Return the config of the model called `name`, or None where only the hub knows it. Arguments as for `load`.

    Raises:
        UserError: no such model, tag or file, with the closest ones; an activation that does not fit the weights; a file that
            leaves it open.
    """
    import open_clip

    if name == MINI:
        from .. import mini

        return mini.architecture()
    if name.startswith("hf-hub:"):
        _file(name, pretrained)
        return None
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise UserError(f"model {name}: no open_clip_config.json in {folder}")
        _activation(name, None, _file(name, pretrained), quick_gelu)
        return open_clip.get_model_config(name)
    key = name.replace("/", "-")
    models = open_clip.list_models()
    if key not in models:
        raise UserError(f"unknown model {name!r}: {_close(key, [MINI, *models])}")
    if pretrained is not None and not open_clip.pretrained.is_pretrained_cfg(key, pretrained):
        tags = open_clip.list_pretrained_tags_by_model(key)
        if not Path(pretrained).is_file():
            known = _close(pretrained, tags) if tags else "it has no tags: give a file, or none"
            raise UserError(f"unknown pretrained tag or file {pretrained!r} for {name}: {known}")
    _activation(key, pretrained, _file(key, pretrained), quick_gelu, [] if assume else None)
    return open_clip.get_model_config(key)


def check_adapter(config: dict[str, Any] | None, lora: LoRAConfig) -> None:
    """Raise UserError where the config alone shows that a rank or a block does not fit; `patch` checks the rest."""
    for encoder, key in (("vision", "vision_cfg"), ("text", "text_cfg")):
        tower = (config or {}).get(key, {})
        width, depth = tower.get("width"), tower.get("layers")
        if encoder not in lora.encoders:
            continue
        if isinstance(width, int) and lora.rank > width:
            raise UserError(f"rank {lora.rank} is above the width of the {encoder} encoder, {width}: choose a smaller rank")
        if isinstance(depth, int):
            try:
                lora.layer_indices(depth)
            except ValueError as error:
                raise UserError(f"{error} (the {encoder} encoder)") from error


def load(
    name: str, pretrained: str | None, device: torch.device, quick_gelu: bool | None = None, *, assume: bool = False
) -> LoadedModel:
    """Build the model, fp32 and in eval mode, on `device`.

    Args:
        quick_gelu: whether the weights were trained with QuickGELU, where they do not say so; None for what they say.
        assume: build what versions did that kept no network: the activation of the model's config for a file that does not name
            its own, and test images resized on the shorter side, bicubic, whatever the model says.

    Raises:
        UserError: weights that cannot be fetched or do not fit, or leave their activation open.
    """
    notes: list[str] = []
    if name == MINI:
        from .. import mini

        try:
            (model, tokenizer), architecture = mini.load(), mini.architecture()
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    else:
        model, tokenizer, architecture = _open_clip(name, pretrained, quick_gelu, assume, notes)
    visual: Any = model.visual
    config = visual.preprocess_cfg
    size = config["size"]
    if isinstance(size, Sequence):
        if len(set(size)) != 1:
            raise UserError(f"{name} takes images of {tuple(size)} pixels; only square ones are supported")
        size = size[0]
    framing = Framing(int(size), config["resize_mode"], config["interpolation"], config["fill_color"])
    network = Network.of(model, tokenizer)
    if assume:
        framing = Framing(framing.size)
        as_framed = {"interpolation": framing.interpolation, "resize_mode": framing.resize_mode}
        network = dataclasses.replace(network, preprocessing={**network.preprocessing, **as_framed})
    mean, std = tuple(config["mean"]), tuple(config["std"])
    weights = _digest(model)
    return LoadedModel(model.to(device).eval(), tokenizer, framing, mean, std, network, weights, architecture, tuple(notes))


def check_same(config: dict[str, Any], loaded: LoadedModel, where: str) -> None:
    """Raise UserError where `loaded` is another network, or has other weights, than a run's config.json says of its base."""
    if "network" not in config:  # written before runs kept it
        return
    try:
        trained = Network.from_dict(config["network"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: its config.json does not say which network was trained: {error!r}") from error
    if told := trained.told(loaded.network):
        raise UserError(f"{where} was trained as another network than {config['recipe']['model']} is now: {told}")
    if config.get("weights", loaded.weights) != loaded.weights:
        raise UserError(
            f"{where} began with other weights than {config['recipe']['model']} with pretrained"
            f" {config['recipe'].get('pretrained')!r} has now: put them back"
        )


def _digest(model: nn.Module) -> str:
    """Return a digest of a few values of each tensor, but for positions, which may be resized, with rounding."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not ("pos" in name and "embed" in name):
            digest.update(name.encode() + sample(tensor).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _open_clip(
    name: str, pretrained: str | None, quick_gelu: bool | None, assume: bool, notes: list[str]
) -> tuple[Any, Any, dict[str, Any]]:
    """Return a model of open_clip, its tokenizer and its config."""
    import open_clip

    key = name if name.startswith(SCHEMAS) else name.replace("/", "-")
    file = _file(key, pretrained)
    quick = _activation(key, pretrained, file, quick_gelu, notes if assume else None)
    options: dict[str, Any] = {"force_quick_gelu": quick} if quick else {"quick_gelu": False} if quick is False else {}
    if file is not None:
        options["force_preprocess_cfg"] = _preprocessing(key, file, Path(pretrained or ""), notes)
    own, scripted = not key.startswith(SCHEMAS), file is not None and file.scripted
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same each time: a run on them can be resumed and tested
            model = open_clip.create_model(key, pretrained if own and not scripted else None, **options)
            if scripted:
                model.load_state_dict(scripted_state(Path(pretrained or "")))
            tokenizer = open_clip.get_tokenizer(key)
    except Exception as error:  # open_clip raises bare RuntimeErrors, torch and the hub their own
        reason = " ".join(str(error).split())[:200]
        hint = "" if pretrained is None or Path(pretrained).is_file() else "; without internet give a checkpoint file"
        raise UserError(f"cannot load {name} with pretrained {pretrained!r}: {reason}{hint}") from error
    if file is not None and file.network is not None and (told := file.network.told(Network.of(model, tokenizer))):
        raise UserError(f"{pretrained} holds the weights of another network than {name}: {told}")
    return model, tokenizer, open_clip.get_model_config(key)


def _file(key: str, pretrained: str | None) -> WeightsFile | None:
    """Return what a file of weights says of itself; None for a tag, for random weights, and where `key` brings its own.

    Raises:
        UserError: a file, or a tag that somebody asked for, beside a model that brings its own.
    """
    import open_clip

    if key.startswith(SCHEMAS):
        if pretrained not in (None, DEFAULT):
            raise UserError(f"{key} brings its own weights, pretrained {pretrained!r} would not be read: leave it out")
        return None
    if pretrained is None or open_clip.pretrained.is_pretrained_cfg(key, pretrained):
        return None
    return recognise(Path(pretrained))


def _activation(
    key: str, pretrained: str | None, file: WeightsFile | None, asked: bool | None, assumed: list[str] | None = None
) -> bool | None:
    """Return whether the model is to be built with QuickGELU; None for what its own config says.

    Args:
        asked: what the user says.
        assumed: where to note that the config's activation was taken for a file that leaves it open; None to ask instead.

    Raises:
        UserError: the user contradicts the weights, or a file leaves it open.
    """
    import open_clip

    known: bool | None = bool(open_clip.get_model_config(key).get("quick_gelu"))
    says = "its own config"
    if not key.startswith(SCHEMAS):
        config, known, says = known, known or None, f"the model {key}"
        if file is not None and file.quick_gelu is not None:
            known, says = file.quick_gelu, f"{pretrained} itself"
        elif file is None and pretrained is not None:
            tag = open_clip.pretrained.get_pretrained_cfg(key, pretrained)
            known, says = bool(tag.get("quick_gelu")) or config, f"the tag {pretrained}"
    if known is None and asked is None and file is not None and f"{key}{TWIN}" in open_clip.list_models():
        if assumed is None:
            raise UserError(
                f"{pretrained} does not say whether it was trained with QuickGELU, and there is {key} with and without: add"
                " --quick-gelu (weights of OpenAI, DFN and MetaCLIP) or --no-quick-gelu (LAION, DataComp and most others)"
            )
        assumed.append(f"{pretrained} does not say whether it was trained with QuickGELU: GELU is assumed, as for {key}")
    if known is not None and asked is not None and asked != known:
        right, wrong = ("QuickGELU", "--no-quick-gelu") if known else ("GELU", "--quick-gelu")
        raise UserError(f"{wrong} contradicts {says}, which says {right}: leave it out")
    return known if asked is None else asked


def _preprocessing(key: str, file: WeightsFile, path: Path, notes: list[str]) -> dict[str, Any]:
    """Return mean, std, interpolation and resize mode for a file: its own, or those that all tags of the model share."""
    import open_clip

    if file.network is not None and file.network.preprocessing:
        return {name: value for name, value in file.network.preprocessing.items() if name != "size"}  # the model has its own
    tags = [open_clip.pretrained.get_pretrained_cfg(key, tag) for tag in open_clip.list_pretrained_tags_by_model(key)]
    forms = [{name: tag[name] for name in PREPROCESSING if name in tag} for tag in tags]
    if file.scripted or not forms:
        return {}
    if all(form == forms[0] for form in forms):
        return forms[0]
    notes.append(
        f"{path} does not say how its images were normalised: OpenAI's mean and standard deviation are assumed"
        " (an open_clip_config.json beside it would say)"
    )
    return {}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _close(name: str, names: Sequence[str]) -> str:
    folded = {n.lower(): n for n in names}
    close = [folded[n] for n in difflib.get_close_matches(name.lower(), list(folded), n=4, cutoff=0.4)]
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(names[:8])}, …"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip and the hub log what we say in one line, or what was asked for (random weights)."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
