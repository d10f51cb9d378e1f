"""A validation split for data sets that come without one."""

from __future__ import annotations

import dataclasses
import random

from .base import Dataset, Item

__all__ = ["hold_out"]


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """`dataset` with `share` of each class's training images as its validation split; the same ones whatever the run's seed.

    At least one image of a class is moved where that leaves one to train on, and, without a test split, one to test on. A set
    that has a validation split keeps its own.
    """
    if dataset.val:
        note = f"--validation {share} not used: it has a validation split of {len(dataset.val)} images"
        return dataclasses.replace(dataset, notes=(*dataset.notes, note))
    needed = 1 if dataset.test is not None else 2
    groups: dict[int, list[Item]] = {}
    for item in dataset.train:
        groups.setdefault(item.label, []).append(item)
    chosen: set[str] = set()
    for label, group in groups.items():
        count = max(0, min(len(group) - needed, max(1, round(share * len(group)))))
        # a generator of its own: what is added to one class must not change another's
        chosen |= {item.name for item in random.Random(f"validation {label}").sample(group, count)}
    val = tuple(item for item in dataset.train if item.name in chosen)
    train = tuple(item for item in dataset.train if item.name not in chosen)
    notes = [*dataset.notes, f"held out for validation: {len(val)} of {len(dataset.train)} training images"]
    if without := len(groups) - len({item.label for item in val}):
        notes.append(f"classes with too few images to hold one out for validation: {without}")
    return dataclasses.replace(dataset, train=train, val=val, notes=tuple(notes))
