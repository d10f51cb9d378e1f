"""What the runs of one process share: loaded models, data sets, decoded images, and what the frozen model makes of them.

A run alone and the same run after others give the same numbers: a model that is lent comes back bit for bit as it was, and
nothing that is kept depends on which run needed it first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..patch import unpatch
from ..record import config_of
from . import datasets, models
from .recipe import Recipe

__all__ = ["Shared"]

T = TypeVar("T")


class Shared:
    """Kept between runs: every data set's lists, one model, and the images of one data set.

    A grid that goes through its data sets one by one decodes each image once, and holds one data set in memory at a time.
    """

    def __init__(self) -> None:
        self._datasets: dict[Hashable, datasets.Dataset] = {}
        self._model: tuple[Hashable, models.LoadedModel] | None = None
        self._about: datasets.Dataset | None = None
        self._kept: dict[Hashable, Any] = {}

    def dataset(self, data: str | datasets.Dataset, root: Path, how: datasets.Reading) -> datasets.Dataset:
        """What `datasets.load` gives, read once; a Dataset is itself."""
        if isinstance(data, datasets.Dataset):
            return data
        key = data, root, how
        if key not in self._datasets:
            self._datasets[key] = datasets.load(data, root, how)
        return self._datasets[key]

    @contextlib.contextmanager
    def model(self, recipe: Recipe, device: torch.device, assume: bool = False) -> Iterator[models.LoadedModel]:
        """Lend the recipe's model for one run, which may patch it or train its own weights. `assume` as for `models.load`."""
        key = recipe.model, recipe.pretrained, recipe.quick_gelu, device, assume
        if self._model is None or self._model[0] != key:
            self._model = None  # the one before goes before the next one comes
            self._model = key, models.load(recipe.model, recipe.pretrained, device, recipe.quick_gelu, assume=assume)
        loaded = self._model[1]
        put_back = remember(loaded.model, recipe.method == "full")
        try:
            yield loaded
        finally:
            put_back()

    def once(self, about: datasets.Dataset, what: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made at the first call for `what`; a call about another data set forgets all of it."""
        if about is not self._about:
            self._about, self._kept = about, {}
        if what not in self._kept:
            self._kept[what] = make()
        return self._kept[what]


def remember(model: nn.Module, weights: bool) -> Callable[[], None]:
    """A function that puts an unpatched `model` back: modules, flags, mode and, if `weights`, every parameter and buffer."""
    mode = model.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before: dict[str, Tensor] = {}
    if weights:
        before = {name: tensor.detach().clone() for name, tensor in _tensors(model)}

    @torch.no_grad()
    def put_back() -> None:
        if config_of(model) is not None:
            unpatch(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, tensor in _tensors(model):
            if name in before:
                tensor.copy_(before[name])
        model.train(mode)

    return put_back


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
