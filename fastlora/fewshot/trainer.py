"""One few-shot run from start to end: data, zero-shot accuracy, training, accuracy after, and the files of RUN."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..patch import patch
from . import datasets, memory, models, summary, wording
from .crops import Normalise
from .devices import choose_device, choose_dtype, current
from .digests import Digests
from .distributed import Ranks
from .errors import UserError
from .evaluate import Exam, autocast, encode_prompts, evaluate, image_features
from .finish import finish, save
from .halves import base_and_new
from .images import EvalImages
from .job import NEW, TEST, Job
from .kept import Kept, Sheet
from .loop import Loop, load_checkpoint
from .methods import coop, probe, tip_adapter
from .methods.frozen import Frozen, views
from .objective import ZeroShotTerm, frozen_twin
from .prepare import Prepared, names, prepare
from .recipe import Recipe, one_or_all, prompts_for
from .result import Result
from .runfolder import RunFolder, identity, write_json
from .shared import Shared
from .signals import Signals

__all__ = ["Job", "run"]

# Methods that see frozen features alone: Frozen -> predictions and what was chosen.
FITTED = {"linear-probe": probe.fit, "tip-adapter-f": tip_adapter.fit}


def run(job: Job, console: Console, shared: Shared | None = None) -> dict[str, Any]:
    """Carry out `job`; returns what metrics.json holds. Runs that are given one `shared` load and decode once.

    Raises:
        UserError: something the user can put right.
        Interrupted: a signal stopped the run; it can be resumed.
    """
    folder = RunFolder(job.out)
    folder.check(identity(job.recipe, job.called), job.resume)
    if folder.metrics.is_file():
        console.print(f"the run in {job.out} is finished already")
        return _read_metrics(folder)
    device = choose_device(job.device)
    with Ranks.join(device) as ranks:
        if ranks.first:
            with current(device):
                return _run(job, folder, device, ranks, console, shared or Shared())
        device = ranks.device(device)
        with tempfile.TemporaryDirectory() as elsewhere, current(device):  # the first rank's files are the run's
            return _run(job, RunFolder(Path(elsewhere)), device, ranks, Console(quiet=True), Shared())


def _run(job: Job, folder: RunFolder, device: torch.device, ranks: Ranks, console: Console, shared: Shared) -> dict[str, Any]:
    recipe = job.recipe
    dtype = choose_dtype(recipe.precision, device)
    memory.reset_peak(device)
    if device.type == "cpu":
        memory.keep_freed()
    with Signals(f"go on with: {job.again}") as signals, folder.owned(), contextlib.ExitStack() as lent:
        folder.check(identity(recipe, job.called), job.resume)  # again: until here another process may have written
        if folder.metrics.is_file():
            raise UserError(f"the run in {job.out} was finished by another process in the meantime")
        whole = shared.dataset(job.data, job.root, recipe.reading)
        datasets.check_training(whole)
        dataset, new = base_and_new(whole) if recipe.base_to_new else (whole, None)
        others = {data: shared.dataset(data, job.root, datasets.Reading()) for data in job.also}
        for other in others.values():
            datasets.check_test(other)
        shown = RunFolder(job.out)  # the run's own folder, which the other ranks read and do not write to
        begun_as = shown.read_config() if job.resume and shown.config.is_file() else None
        old = begun_as is not None and "network" not in begun_as  # what an earlier version built is built again
        models.check_adapter(models.check(recipe.model, recipe.pretrained, recipe.quick_gelu, assume=old), recipe.lora)
        if job.resume:
            shown.check_classes(dataset.classes)
        begun = time.monotonic()
        loaded = lent.enter_context(shared.model(recipe, device, old))
        if begun_as is not None:
            models.check_same(begun_as, loaded, "the run to go on with")
        data = prepare(dataset, recipe, loaded.framing, console, shared, whole, job.images)
        data.remarks += loaded.notes
        timings = {"load model, decode training images": time.monotonic() - begun}
        folder.remove_leftovers()
        setting = {
            "fastlora": summary.own_version(), "data_name": dataset.name, "classes": list(dataset.classes),
            "template": one_or_all(data.templates), "flip": data.flip, "root": str(job.root),
            "network": loaded.network.to_dict(), "weights": loaded.weights,
        }  # fmt: skip
        kept = _kept(data, new, others, whole, shared, console)
        if len(dataset.classes) < ranks.world:
            raise UserError(f"{ranks.world} processes share {len(dataset.classes)} class prompts: start one a class at most")
        state = load_checkpoint(shown.checkpoint) if job.resume and shown.checkpoint.is_file() else None
        ranks.wait()  # nobody writes before all have read
        if state is not None:
            kept.check(state["extra"], job.called, job.out)
        data.remarks += [f"{name}: {note}" for name, other in others.items() for note in other.notes]
        data.remarks += kept.notes() if recipe.method != "zero-shot" else []
        write_json(folder.config, identity(recipe, job.called) | setting)
        write_json(folder.split, kept.split())

        def exam(name: str, about: datasets.Dataset, images: EvalImages) -> Exam:
            templates = prompts_for(recipe.template, about.template, about.own_template)
            tokens = loaded.tokenise(templates, about.classes)
            for note in wording.remarks(loaded, templates, about.classes, tokens):
                data.remarks.append(note if name == TEST else f"{name}: {note}")
                console.print(f"note: {data.remarks[-1]}", style="bold", highlight=False, markup=False)
            return Exam(name, about.classes, images, tokens.to(device))

        def held_out(about: datasets.Dataset) -> EvalImages:
            items = about.train if about.test is None else about.test
            key = "test images", loaded.framing, about.classes, names(items)
            return shared.once(whole, key, lambda: EvalImages(items, loaded.framing, console))

        exams = [exam(TEST, dataset, data.test)]
        exams += [exam(NEW, new, held_out(new))] if new is not None else []
        exams += [exam(name, other, held_out(other)) for name, other in others.items()]
        normalise = Normalise(loaded.mean, loaded.std, device)
        frozen = recipe.model, recipe.pretrained, recipe.quick_gelu, device, dtype
        begun = time.monotonic()
        before = {} if state is None else _restored(state["extra"]["zero_shot"], exams)
        for sat in exams:
            if sat.name not in before:
                what = f"zero-shot: {sat.name}"
                say = partial(evaluate, loaded.model, sat, normalise, dtype, console, what)
                before[sat.name] = shared.once(whole, (what, *frozen, recipe.template, sat.classes, sat.images), say)
            if not len(before[sat.name].labels):
                where = job.called if sat.name in (TEST, NEW) else sat.name
                raise UserError(f"no test image of {where} can be read, the first is {sat.images.first_broken()}")
        if state is not None:
            console.print(f"going on from step {state['step']} of {recipe.steps}")
        timings["zero-shot test"] = time.monotonic() - begun
        tested = before[TEST]
        console.print(f"zero-shot accuracy: {tested.accuracy:.2f} % of {len(tested.labels)} test images")

        details: dict[str, Any] = {}
        loop = None
        after = before
        begun = time.monotonic()
        if recipe.trains:
            term = _zero_shot_term(loaded, recipe, exams[0].tokens, dtype)
            context = None
            if recipe.method == "coop":
                alone = [loaded.tokenise([coop.NAMES], sat.classes).to(device) for sat in exams]
                torch.manual_seed(recipe.seed)
                context, placed, undo = coop.place(loaded.model, alone)
                lent.callback(undo)
                exams = [dataclasses.replace(sat, tokens=prompts) for sat, prompts in zip(exams, placed, strict=True)]
            loop = _train(
                job, folder, loaded, data, exams[0].tokens, dtype, term, state, before, kept, signals, ranks, console, details
            )
            timings["training"] = loop.seconds
            begun = time.monotonic()
            after = {sat.name: evaluate(loaded.model, sat, normalise, dtype, console, f"testing: {sat.name}") for sat in exams}
            timings["test"] = time.monotonic() - begun
            save(loaded, context, folder, job)
        elif recipe.uses_frozen_features:
            features = partial(image_features, loaded.model, data.test, normalise, dtype, console, "features")
            test = shared.once(whole, ("test features", *frozen, data.test), features)
            given = _frozen(loaded, data, exams[0].tokens, test, normalise, dtype, recipe, console)
            fitted, details = FITTED[recipe.method](given)
            after = {TEST: fitted}
            timings[recipe.method.replace("-", " ")] = time.monotonic() - begun
        return finish(job, folder, data, before, after, loop, details, timings, device, dtype, console)


def _kept(data: Prepared, new: datasets.Dataset | None, others: dict[str, datasets.Dataset], whole: datasets.Dataset,
          shared: Shared, console: Console) -> Kept:  # fmt: skip
    """Look at every image that is drawn or tested."""

    def sheet(about: datasets.Dataset, items: tuple[datasets.Item, ...], which: str = "") -> Sheet:
        return Sheet(about.classes, items, shared.once(whole, ("digests", which), Digests).of(items, console))

    drawn = {"train": sheet(data.dataset, data.shots.train), "val": sheet(data.dataset, data.shots.val)}
    tests = {TEST: sheet(data.dataset, data.shots.test)}
    if new is not None:
        tests[NEW] = sheet(new, new.tested)
    return Kept(drawn, tests | {name: sheet(other, other.tested, name) for name, other in others.items()})


def _restored(zero_shot: dict[str, Any], exams: list[Exam]) -> dict[str, Result]:
    return {exam.name: Result(exam.classes, **zero_shot[exam.name]) for exam in exams if exam.name in zero_shot}


def _train(job: Job, folder: RunFolder, loaded: models.LoadedModel, data: Prepared, tokens: Tensor, dtype: torch.dtype | None,
           term: ZeroShotTerm | None, state: dict[str, Any] | None, before: dict[str, Result], kept: Kept,
           signals: Signals, ranks: Ranks, console: Console, details: dict[str, Any]) -> Loop:  # fmt: skip
    recipe, model = job.recipe, loaded.model
    torch.manual_seed(recipe.seed)
    if recipe.method == "lora":
        try:
            patched = patch(model, recipe.lora)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        console.print(str(patched))
        details["skipped"] = patched.skipped
    elif recipe.method == "full":
        model.requires_grad_(True)
        model.logit_scale.requires_grad_(False)  # as with LoRA: the temperature is the pretrained one
    trainable = sum(p.numel() for p in models.trained_state(model).values())
    details["trainable_parameters"] = trainable
    # the checkpoint and its successor, each with parameters and AdamW's two moments, and the result
    folder.check_space(7 * 4 * trainable)
    trained = data.training_set(recipe, loaded, tokens.device, console)
    loop = Loop(model, recipe, trained, tokens, dtype, ranks, term, job.engine, job.microbatch, console.print)
    if state is not None:
        loop.restore(state)
    extra = kept.to_state() | {"zero_shot": {name: result.tensors() for name, result in before.items()}}
    with _NoLog() if job.brief else _log(folder.log, loop.step) as log:
        log.add_scalar("test/accuracy", before[TEST].accuracy, 0)
        every = job.checkpoint_seconds, job.checkpoint_steps
        loop.run(console, signals, folder.checkpoint, *every, extra, log)
    return loop


@torch.no_grad()
def _zero_shot_term(
    loaded: models.LoadedModel, recipe: Recipe, tokens: Tensor, dtype: torch.dtype | None
) -> ZeroShotTerm | None:
    """The term of the loss that `recipe` asks for; the model must be as it was loaded."""
    if not recipe.kl_weight:
        return None
    twin = frozen_twin(loaded.model, share=recipe.method != "full")
    with autocast(tokens.device, dtype):
        text = encode_prompts(twin, tokens)
    return ZeroShotTerm(twin, text, recipe.kl_weight, recipe.kl_temperature)


def _log(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


class _NoLog(contextlib.AbstractContextManager["_NoLog"]):
    """A SummaryWriter that writes nothing."""

    def __exit__(self, *_: object) -> None:
        pass

    def add_scalar(self, *_: object) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""


def _frozen(loaded: models.LoadedModel, data: Prepared, tokens: Tensor, test: tuple[Tensor, Tensor], normalise: Normalise,
            dtype: torch.dtype | None, recipe: Recipe, console: Console) -> Frozen:  # fmt: skip
    """What the methods on frozen features are given."""

    def centre(items: tuple[datasets.Item, ...]) -> tuple[Tensor, Tensor]:
        kept = [item for item in items if item.name not in data.decoded.broken]
        return image_features(loaded.model, EvalImages(kept, loaded.framing, console), normalise, dtype, console, "features")

    with torch.no_grad(), autocast(tokens.device, dtype):
        text = encode_prompts(loaded.model, tokens)
    images = [data.decoded.images[item.name] for item in data.shots.train]
    crops = partial(views, loaded.model, images, recipe, loaded.size, data.flip, normalise, dtype)
    scale = float(loaded.model.logit_scale.detach().exp())
    shots = data.shots
    return Frozen(data.dataset.classes, centre(shots.train), centre(shots.val), test, text, scale, crops, recipe.seed)


def _read_metrics(folder: RunFolder) -> dict[str, Any]:
    return json.loads(folder.metrics.read_text(encoding="utf-8"))
