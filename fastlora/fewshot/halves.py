"""Base-to-new: train on the first half of the classes, test on both halves, each told apart by its own words alone.

The protocol is that of Zhou et al., "Conditional Prompt Learning for Vision-Language Models", CVPR 2022, arXiv 2203.05557.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from .datasets import Dataset, Item
from .errors import UserError

__all__ = ["base_and_new", "harmonic_mean"]


def base_and_new(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """The first half of the classes in the order of their labels (one more where they are odd), and the rest, from label 0 on.

    Raises:
        UserError: fewer than four classes: a half of one class is always right.
    """
    n = len(dataset.classes)
    if n < 4:
        raise UserError(f"base-to-new needs at least 4 classes, two in each half: {dataset.name} has {n}")
    middle = (n + 1) // 2
    return _part(dataset, 0, middle), _part(dataset, middle, n)


def harmonic_mean(base: float, new: float) -> float:
    """2 base · new / (base + new); 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def _part(dataset: Dataset, first: int, end: int) -> Dataset:
    def of_part(items: Iterable[Item]) -> tuple[Item, ...]:
        return tuple(dataclasses.replace(item, label=item.label - first) for item in items if first <= item.label < end)

    test = None if dataset.test is None else of_part(dataset.test)
    return dataclasses.replace(
        dataset, classes=dataset.classes[first:end], train=of_part(dataset.train), val=of_part(dataset.val), test=test
    )
