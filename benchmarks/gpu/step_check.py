"""Whether a captured training step takes the steps of the eager engine."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

import fastlora
from fastlora import eager, mini, verdicts
from fastlora.budget import Maxima
from fastlora.fewshot.crops import Normalise
from fastlora.fewshot.engines import graphed
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.placement import TrainingSet
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.store import OnDevice

from .checks import Capture, capture_here

__all__ = ["captured_step"]

CLASSES = 4
SIZE = 64  # of the mini CLIP's images


def captured_step(
    device: torch.device, *, dtype: torch.dtype | None = None, steps: int = 6, batch: int = 8, capture: Capture | None = None
) -> dict[str, Any]:
    """Some few-shot steps of the mini CLIP, captured once and replayed, have the losses of the eager engine.

    Both run the same kernels on the same numbers and differ by nothing but what a library sums in another order. So the rule
    of fastlora.budget holds for the losses, with the eager engine as the plain form, and a float64 loop, whose masks are the
    same, as the truth.

    Args:
        dtype: what the towers compute in; None for float32.
        capture: as in `checks.replays`.
    """
    plain, graph, exact = (_loop(device, of, steps, batch) for of in (dtype, dtype, torch.float64))
    with graph._frozen_in():
        expected = _losses(plain, steps)
        graph._run = graphed(graph._step, graph.inputs(0), capture or capture_here(device))
        found = _losses(graph, steps)
    truth = _losses(exact, steps)
    maxima = Maxima()
    maxima.add({"loss": found}, {"loss": expected}, {"loss": truth})
    numbers = maxima.read()["loss"]
    assert numbers.ok(torch.float32), (
        f"{steps} captured steps in {dtype or torch.float32} do not have the losses of the eager engine:"
        f" {found.tolist()} instead of {expected.tolist()}; {numbers.words(torch.float32)}"
    )
    served = verdicts.book(graph.device).served.values() if device.type == "cuda" else []
    return {
        "steps": steps,
        "dtype": str(dtype or torch.float32).removeprefix("torch."),
        "losses": found.tolist(),
        "same_bits": torch.equal(found, expected),
        "share": numbers.share(torch.float32),
        "classes_by_triton": sum(one.module is not eager for one in served),
        "classes_by_eager": sum(one.module is eager for one in served),
    }


class _Exact(Normalise):
    """The same numbers in float64."""

    def __call__(self, crops: Tensor) -> Tensor:
        return super().__call__(crops).double()


def _loop(device: torch.device, dtype: torch.dtype | None, steps: int, batch: int) -> Loop:
    """The recipe on noise of four classes: the same start, batches and masks each time. float64 is the model's own dtype."""
    draws = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = mini.build().to(device)
        fastlora.patch(model, rank=4, dropout=0.25)
    normalise = Normalise([0.5] * 3, [0.25] * 3, device)
    if dtype == torch.float64:
        model, normalise, dtype = model.double(), _Exact([0.5] * 3, [0.25] * 3, device), None
    # not a multiple of the batch: the last one of an epoch is filled up
    images = [torch.randint(0, 256, (3, SIZE + 3 * i, SIZE), generator=draws).to(torch.uint8) for i in range(2 * batch + 1)]
    labels = (torch.arange(len(images)) % CLASSES).to(device)
    tokens = torch.zeros(CLASSES, 77, dtype=torch.int64)
    for i, row in enumerate(tokens):
        length = 6 + i
        row[:length] = torch.randint(1, 1000, (length,), generator=draws)
        row[length - 1] = 49407  # the end token, by which open_clip finds the end
    data = TrainingSet(OnDevice(images, SIZE, device), labels, normalise, flip=True)
    recipe = Recipe(model="mini", iterations=steps, batch_size=batch, lr=1e-2, seed=3)
    made = Loop(model, recipe, data, tokens.to(device), dtype, engine="eager")
    made.draws = dataclasses.replace(made.draws, fill=True)
    return made


def _losses(made: Loop, steps: int) -> Tensor:
    """The loss of each of the first steps."""
    for _ in range(steps):
        made.train_step()
    made.read()
    return made.history[:steps, 0].clone()
