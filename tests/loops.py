"""Training loops over a tiny CLIP and random images, in memory, for the tests of engines and stores."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import fastlora
from fastlora.fewshot.crops import Normalise
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.objective import ZeroShotTerm
from fastlora.fewshot.placement import TrainingSet
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.store import OnCPU, OnDevice, Store
from models import tiny

# 7 images in batches of 3: the last batch of an epoch has one image.
STEPS, IMAGES, BATCH, CLASSES = 7, 7, 3, 4
CPU = torch.device("cpu")


def pictures(n: int = IMAGES, seed: int = 0) -> list[Tensor]:
    """uint8 images of different sizes, each of one colour and some noise."""
    draws = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 200, (n, 3, 1, 1), generator=draws)
    return [
        (colour + torch.randint(0, 56, (3, 20 + 3 * i, 44 - 2 * i), generator=draws)).to(torch.uint8)
        for i, colour in enumerate(colours)
    ]


def training_set(store: Store, device: torch.device = CPU) -> TrainingSet:
    """`store`'s images in CLASSES classes."""
    labels = (torch.arange(len(store.sizes)) % CLASSES).to(device)
    return TrainingSet(store, labels, Normalise([0.5] * 3, [0.25] * 3, device), flip=True)


def tokens(device: torch.device = CPU) -> Tensor:
    """Prompts of different lengths for a tiny CLIP, (CLASSES, 16)."""
    ids = torch.zeros(CLASSES, 16, dtype=torch.int64)
    for row, length in zip(ids, (5, 7, 4, 7), strict=True):
        row[: length - 1] = torch.arange(3, length + 2) * (length + 1) % 90
        row[length - 1] = 99
    return ids.to(device)


def loop(device: torch.device = CPU, *, on_device: bool = True, fill: bool = False, engine: str = "eager",
         dtype: torch.dtype | None = None, dropout: float = 0.25, microbatch: int | None = None, model: Any = None,
         lora: dict[str, Any] | None = None, term: ZeroShotTerm | None = None, **changes: Any) -> Loop:  # fmt: skip
    """A loop over `pictures`. `fill`: repeat images of short batches whatever the engine; `lora`: options of the adapters."""
    values = {"iterations": STEPS, "batch_size": BATCH, "lr": 1e-2, "seed": 3, **changes}
    model = (model or tiny()).to(device)
    torch.manual_seed(5)
    if values.get("method", "lora") == "lora":
        fastlora.patch(model, rank=4, dropout=dropout, **(lora or {}))
    else:
        model.logit_scale.requires_grad_(False)
    store = OnDevice(pictures(), 32, device) if on_device else OnCPU(pictures(), 32)
    recipe, data = Recipe(model="mini", **values), training_set(store, device)
    how: dict[str, Any] = {"term": term, "engine": engine, "microbatch": microbatch}
    made = Loop(model, recipe, data, tokens(device), dtype, **how)
    made.draws = dataclasses.replace(made.draws, fill=fill or made.draws.fill)
    return made


def losses(made: Loop, steps: int = STEPS) -> Tensor:
    """Loss and accuracy of each of so many steps more, (steps, 2)."""
    first = made.step
    for _ in range(steps):
        made.train_step()
    made.read()
    return made.history[first : made.step]


def weights(made: Loop) -> dict[str, Tensor]:
    """What is trained, copied to the CPU."""
    return {name: p.detach().cpu().clone() for name, p in made.model.named_parameters() if p.requires_grad}
