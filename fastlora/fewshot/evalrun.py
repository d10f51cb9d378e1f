"""`fastlora eval`: the model that a run adapted, tested on any data set."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import checkpoint as adapters
from . import datasets, memory, models, report, summary, wording
from .crops import Normalise
from .devices import choose_device, choose_dtype, current
from .digests import find
from .errors import UserError
from .evaluate import Exam, evaluate
from .images import EvalImages
from .lock import check_free
from .methods import coop
from .recipe import Recipe, one_or_all, prompts_for
from .runfolder import RunFolder, atomic, write_json
from .signals import Signals

__all__ = ["adapt", "finished", "loaded_for", "run"]


def run(
    folder: RunFolder,
    data: str,
    root: Path,
    device_name: str,
    out: Path | None,
    template: str | tuple[str, ...] | None,
    console: Console,
    how: datasets.Reading | None = None,
) -> dict[str, Any]:
    """Test the adapted model of `folder` on `data`, beside the model before; returns what metrics.json holds.

    Args:
        folder: a finished run by a method that classifies by words.
        data: what `datasets.load` takes. Other classes than the run's are fine: they are words.
        out: where metrics.json, predictions.csv and report.html go, or None.
        template: the prompt or several, or None for the run's.
        how: how `data` is read; None for as the run read it, if these are the run's own data.

    Raises:
        UserError: a run that is not finished or left nothing to load, a bad data set, a class without a test image.
    """
    config, recipe = finished(folder)
    if not recipe.names_any_class:
        raise UserError(f"the run in {folder.path} is by {recipe.method}, which leaves no model to test")
    device = choose_device(device_name)
    dtype = choose_dtype(recipe.precision, device)
    memory.reset_peak(device)
    if how is None:
        how = recipe.reading if data == config["data"] else datasets.Reading()
    dataset = datasets.load(data, root, how)
    items, left_out = dataset.tested, list[str]()
    if recipe.method != "zero-shot" or dataset.test is None:  # a zero-shot run trained on nothing
        items, left_out = _never_drawn(dataset, folder.read_split(), config["data_name"], console)
    notes = [*dataset.notes, *left_out]
    if left_out and recipe.reading.class_names is not None and how.class_names is None:
        notes.append(f"the run took its class names from {recipe.reading.class_names}, here they are those of {data}")
    try:
        datasets.check_test(dataset, items)
    except UserError as error:
        raise UserError(f"{error} ({'; '.join(left_out)})" if left_out else str(error)) from None
    with Signals("run it again"), current(device), _place(out) as target:
        loaded = loaded_for(config, recipe, device, console)
        prompts = prompts_for(template or config["template"], dataset.template, dataset.own_template)
        prompt = one_or_all(prompts)
        tokens = loaded.tokenise(prompts, dataset.classes)
        notes += wording.remarks(loaded, prompts, dataset.classes, tokens)
        tokens = tokens.to(device)
        normalise = Normalise(loaded.mean, loaded.std, device)
        test = EvalImages(items, loaded.framing, console)
        exam = Exam("test", dataset.classes, test, tokens)
        rest = (exam, normalise, dtype, console)
        begun = time.monotonic()
        before = evaluate(loaded.model, *rest, "zero-shot test")
        after = before
        if recipe.method == "coop":
            names = loaded.tokenise([coop.NAMES], dataset.classes).to(device)
            context, (placed,), _ = coop.place(loaded.model, [names])
            coop.load(context, folder.context)
            after = evaluate(loaded.model, dataclasses.replace(exam, tokens=placed), *rest[1:])
        elif recipe.method != "zero-shot":
            adapt(loaded.model, recipe, folder, loaded.tokenizer)
            after = evaluate(loaded.model, *rest)
        resolved = {"template": prompt, "data": data, "reading": dataclasses.asdict(how)}
        metrics = {"method": recipe.method, "run": str(folder.path), **summary.measures(before, after), "resolved": resolved}
        metrics["timings"] = {"test": round(time.monotonic() - begun, 3)}
        metrics["memory"] = memory.peak(device)
        metrics["notes"] = [*notes, *test.decoded.notes()]
        metrics["environment"] = summary.environment(device, dtype)
        summary.print_result(metrics, console)
        if target is not None:
            shown = config | {"data": data, "data_name": dataset.name, "classes": list(dataset.classes), "template": prompt}
            with atomic(target.predictions) as temporary:
                after.write_csv(temporary, [item.name for item in test.items])
            with atomic(target.report) as temporary:
                report.write(temporary, shown, metrics, before, after, test.items, None)
            write_json(target.metrics, metrics)
            console.print(f"report: {target.report.resolve()}", soft_wrap=True, highlight=False)
    return metrics


@contextlib.contextmanager
def _place(out: Path | None) -> Iterator[RunFolder | None]:
    """Within: `out` is owned, and nothing in it will be overwritten."""
    if out is None:
        yield None
        return
    target = RunFolder(out)
    with target.owned():
        target.check_empty()
        yield target


def _never_drawn(
    dataset: datasets.Dataset, split: dict[str, Any], data_name: str, console: Console
) -> tuple[tuple[datasets.Item, ...], list[str]]:
    """The images to test without those that the run drew, and notes on these.

    Args:
        split: what the run's split.json holds.
        data_name: what the run called its data, by which alone an older run knows them.
    """
    items = dataset.tested
    if "digests" not in split:
        left = items
        if dataset.test is None and dataset.name == data_name:
            left = tuple(item for item in items if item.name not in split["train"])
        note = f"images with the names of those that the run trained on, left out: {len(items) - len(left)}"
        return left, [f"{note}; it kept no digests, by which it would know them under other names: train it again"]
    train, val = (set(split["digests"][role]) for role in ("train", "val"))
    found, unknown = find(items, train | val, console)
    notes = []
    for what, known in (("trained on", train), ("drew for validation", val - train)):
        if count := sum(digest in known for digest in found if digest is not None):
            notes.append(f"images that the run {what}, left out: {count}")
    if unknown:
        notes.append(f"images without files, which cannot be compared with those the run trained on: {unknown}")
    return tuple(item for item, digest in zip(items, found, strict=True) if digest is None), notes


def finished(folder: RunFolder) -> tuple[dict[str, Any], Recipe]:
    """config.json of a finished run, and its recipe.

    Raises:
        UserError: not the folder of a run, not finished, or somebody is at work in it.
    """
    check_free(folder.path)
    config = folder.read_config()
    try:
        recipe = Recipe.from_dict(config["recipe"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder.config}: {error}") from error
    if not folder.metrics.is_file():
        raise UserError(f"the run in {folder.path} is not finished: go on with it by fastlora train … --resume")
    return config, recipe


def loaded_for(config: dict[str, Any], recipe: Recipe, device: torch.device, console: Console) -> models.LoadedModel:
    """Build the model that a run began with.

    Raises:
        UserError: it cannot be built, or is another network now than config.json describes.
    """
    old = "network" not in config  # written before runs kept it: what was built then is built again
    models.check(recipe.model, recipe.pretrained, recipe.quick_gelu, assume=old)
    loaded = models.load(recipe.model, recipe.pretrained, device, recipe.quick_gelu, assume=old)
    models.check_same(config, loaded, "the run")
    assumed = [f"the run is of an earlier version, which kept no network: assumed is {loaded.network.words()}"] if old else []
    for note in (*assumed, *loaded.notes):
        console.print(note, soft_wrap=True, highlight=False, markup=False)
    return loaded


def adapt(model: Any, recipe: Recipe, folder: RunFolder, tokenizer: Any = None) -> None:
    """Put what the run saved onto the model as it was before; `tokenizer` as for `fastlora.load`.

    Raises:
        UserError: it cannot be loaded, or is not what config.json says.
    """
    try:
        if recipe.method == "lora":
            with warnings.catch_warnings():  # of an old run loaded_for has told it
                warnings.filterwarnings("ignore", ".* was saved by an earlier version")
                report = adapters.load(model, folder.adapter, tokenizer=tokenizer)
            if dataclasses.asdict(report.config) != dataclasses.asdict(recipe.lora):
                raise UserError(f"{folder.adapter} was saved with {report.config}, config.json says {recipe.lora}")
        else:
            from safetensors.torch import load_model

            load_model(model, folder.model)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load what {folder.path} saved: {error}") from error
