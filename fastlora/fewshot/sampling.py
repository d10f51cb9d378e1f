"""Which images a run trains on: drawn per class after seeding, as CLIP-LoRA does.

min(shots, 4) validation images are drawn first, then the shots, from one generator, so that a seed names one draw.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Collection, Sequence

from .datasets import Dataset, Item

__all__ = ["FewShot", "draw"]

VAL_SHOTS = 4
# Where a folder has no test images, this share of each class is kept for testing, and at least one image.
TEST_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class FewShot:
    """The images of one run, by role, and what to tell about them, one line each."""

    train: tuple[Item, ...]
    val: tuple[Item, ...]
    test: tuple[Item, ...]
    notes: tuple[str, ...]


def draw(dataset: Dataset, shots: int, seed: int, unreadable: Collection[str] = ()) -> FewShot:
    """Draw `shots` training images per class.

    Args:
        dataset: what to draw from.
        shots: images per class; a class with fewer gives all it has.
        seed: names the draw.
        unreadable: names of images that turned out to be broken. Each is replaced by another of its class where there is
            one; all other images stay the same.
    """
    generator = random.Random(seed)
    wanted_val = dict.fromkeys(range(len(dataset.classes)), min(shots, VAL_SHOTS))
    val = _draw_role(dataset.val, wanted_val, generator, seed, unreadable)
    groups = _by_class(dataset.train)
    wanted = {}
    for label in range(len(dataset.classes)):
        have = len(groups.get(label, ()))
        kept = 0 if dataset.test is not None else min(have - 1, max(1, math.ceil(TEST_SHARE * have)))
        wanted[label] = min(shots, have - kept)
    train = _draw_role(dataset.train, wanted, generator, seed, unreadable)
    if dataset.test is None:
        used = {item.name for item in train}
        test = [item for item in dataset.train if item.name not in used]
    else:
        test = list(dataset.test)
    test = [item for item in test if item.name not in unreadable]
    return FewShot(tuple(train), tuple(val), tuple(test), tuple(_notes(dataset, shots, train, test)))


def _draw_role(
    items: Sequence[Item],
    wanted: dict[int, int],
    generator: random.Random,
    seed: int,
    unreadable: Collection[str],
) -> list[Item]:
    """wanted[label] images of each class, classes in order of first appearance."""
    drawn = []
    for label, group in _by_class(items).items():
        chosen = generator.sample(group, wanted[label]) if len(group) > wanted[label] else list(group)
        broken = [item for item in chosen if item.name in unreadable]
        if broken:
            taken = {item.name for item in chosen} | set(unreadable)
            spare = [item for item in group if item.name not in taken]
            # its own generator: a broken image must not change what the other classes get
            random.Random(f"{seed}/{label}").shuffle(spare)
            chosen = [item for item in chosen if item.name not in unreadable] + spare[: len(broken)]
        drawn += chosen
    return drawn


def _by_class(items: Sequence[Item]) -> dict[int, list[Item]]:
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def _notes(dataset: Dataset, shots: int, train: Sequence[Item], test: Sequence[Item]) -> list[str]:
    notes = []
    train_of, test_of = _by_class(train), _by_class(test)
    few = [(name, len(train_of.get(i, ()))) for i, name in enumerate(dataset.classes) if len(train_of.get(i, ())) < shots]
    if few:
        notes.append(f"classes with fewer than {shots} training images: {_examples([f'{n} ({c})' for n, c in few])}")
    untested = [name for i, name in enumerate(dataset.classes) if i not in test_of]
    if untested:
        notes.append(f"classes without a test image: {_examples(untested)}")
    return notes


def _examples(names: Sequence[str], most: int = 5) -> str:
    """How many, and the first few by name."""
    more = ", …" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{more}"
