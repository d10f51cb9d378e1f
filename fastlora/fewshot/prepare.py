"""From a data set to what a run needs of it: the shots drawn and decoded, the test images, the prompts."""

from __future__ import annotations

import dataclasses

import torch
from rich.console import Console

from . import datasets, models, sampling
from .errors import UserError
from .images import Decoded, EvalImages, Framing, decode_training
from .placement import TrainingSet, training_set
from .recipe import Recipe, prompts_for
from .shared import Shared

__all__ = ["Prepared", "names", "prepare"]


@dataclasses.dataclass
class Prepared:
    """A data set's images as a model of one size takes them."""

    dataset: datasets.Dataset
    shots: sampling.FewShot
    decoded: Decoded
    test: EvalImages
    templates: tuple[str, ...]
    flip: bool
    remarks: list[str] = dataclasses.field(default_factory=list)  # what the run found out later

    def prompts(self) -> list[str]:
        """Prompts, class by class, one for each template."""
        return [template.format(name) for name in self.dataset.classes for template in self.templates]

    def training_set(self, recipe: Recipe, loaded: models.LoadedModel, device: torch.device, console: Console) -> TrainingSet:
        """What is trained on, where `device` gets it fastest."""
        return training_set(self.shots.train, self.decoded, recipe.max_side, loaded, device, self.flip, console)

    def notes(self) -> list[str]:
        """What was left out, shrunk or converted: one line each."""
        drawn, tested = self.decoded, self.test.decoded
        both = Decoded({}, drawn.broken | tested.broken, drawn.remarks | tested.remarks)
        return [*self.dataset.notes, *self.shots.notes, *self.remarks, *both.notes()]


def prepare(
    dataset: datasets.Dataset,
    recipe: Recipe,
    framing: Framing,
    console: Console,
    shared: Shared,
    whole: datasets.Dataset | None = None,
    images: str = "auto",
) -> Prepared:
    """Draw the shots and decode them; a broken image is replaced by another of its class where there is one.

    What is decoded is kept in `shared` as part of `whole`, the data set that `dataset` is a part of.

    Raises:
        UserError: a class without a readable training image, or no test image at all.
    """
    whole = whole or dataset
    decoded = shared.once(whole, ("training images", recipe.max_side), Decoded)
    broken: set[str] = set()  # those this run came upon: what others found must not change its draw
    needs_images = recipe.method != "zero-shot"
    while True:
        shots = sampling.draw(dataset, recipe.shots, recipe.seed, broken)
        have = {item.label for item in shots.train}
        for label, name in enumerate(dataset.classes):
            if label not in have:
                bad = [item.name for item in dataset.train if item.label == label and item.name in broken]
                why = f"the first is {bad[0]} ({decoded.broken[bad[0]]})" if bad else "there is none"
                raise UserError(f"class {name!r} has no readable training image: {why}")
        wanted = [*shots.train, *shots.val] if recipe.uses_frozen_features else shots.train
        if not needs_images:
            break
        # methods on frozen features take crops of all images at once
        decode_training(wanted, recipe.max_side, decoded, console, images if recipe.trains else "memory")
        found = {item.name for item in wanted if item.name in decoded.broken}
        if not found:
            break
        broken |= found
    if not shots.test:
        raise UserError(f"no test images in {dataset.name}: add a folder test beside train, or more images a class")
    flip = dataset.flip if recipe.flip is None else recipe.flip
    test = shared.once(
        whole, ("test images", framing, dataset.classes, names(shots.test)), lambda: EvalImages(shots.test, framing, console)
    )
    prompts = prompts_for(recipe.template, dataset.template, dataset.own_template)
    own = decoded.of([*broken, *(item.name for item in wanted)])
    return Prepared(dataset, shots, own, test, prompts, flip)


def names(items: tuple[datasets.Item, ...]) -> tuple[str, ...]:
    """What the images are called."""
    return tuple(item.name for item in items)
