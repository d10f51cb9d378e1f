"""What a run keeps of its images, to know them again: those drawn in split.json, those of its tests in the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .datasets import Item
from .errors import UserError
from .job import NEW, TEST

__all__ = ["Kept", "Sheet"]


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Images for one purpose: the names of their classes, which their labels index, and a digest of each."""

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    digests: list[str]

    def names(self) -> list[str]:
        """Return what the images are called."""
        return [item.name for item in self.items]

    def numbers(self) -> Tensor:
        """Return one number an image that stands for its content and its class, int64 (n,)."""
        rows = zip(self.items, self.digests, strict=True)
        said = [f"{item.label} {self.classes[item.label]} {digest}".encode("utf-8", "surrogatepass") for item, digest in rows]
        hashes = [hashlib.blake2b(text, digest_size=8).digest() for text in said]
        return torch.tensor([int.from_bytes(found, "little", signed=True) for found in hashes], dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Kept:
    """The images of a run: those drawn, "train" and "val", and those of each test, by its name."""

    drawn: dict[str, Sheet]
    tests: dict[str, Sheet]

    def split(self) -> dict[str, Any]:
        """Return what split.json holds: the names of the images drawn, by role, and their digests."""
        names = {role: sheet.names() for role, sheet in self.drawn.items()}
        return {**names, "digests": {role: sheet.digests for role, sheet in self.drawn.items()}}

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        drawn, tests = ({key: sheet.numbers() for key, sheet in one.items()} for one in (self.drawn, self.tests))
        return {"split": self.split(), "drawn": drawn, "tests": tests}

    def check(self, was: dict[str, Any], data: str, out: Path) -> None:
        """Raise UserError unless these are the images of the run in `out`, whose checkpoint kept `was`, wherever they lie now.

        A checkpoint of an older version kept the names of the images drawn and nothing of the tests.
        """
        what, change = f"the images in {data}", _other_images(was["split"], self.split())
        for role, numbers in was.get("drawn", {}).items():
            if change is None and (first := _first_other(numbers, self.drawn[role])) is not None:
                change = f"{self.drawn[role].items[first].name} is of another class"
        for name, numbers in was.get("tests", {}).items():
            sheet = self.tests.get(name)
            if change is None and sheet is not None and (first := _first_other(numbers, sheet)) is not None:
                what = f"the images in {name}" if name not in (TEST, NEW) else f"the {name} images in {data}"
                called = sheet.items[first].name if first < len(sheet.items) else "behind the last"
                change = f"{len(numbers)} then, {len(sheet.items)} now, the first that differs is {called}"
        if change is not None:
            raise UserError(
                f"--resume: {what} are not those the run in {out} began with: {change};"
                " put them back, or begin another run in another --out"
            )

    def notes(self) -> list[str]:
        """Return what there is to say of images that are there more than once: trained on twice, or trained on and tested."""
        train = self.drawn["train"]
        first = dict(zip(reversed(train.digests), reversed(train.names()), strict=True))
        twice = [(name, first[d]) for name, d in zip(train.names(), train.digests, strict=True) if first[d] != name]
        found = [("images trained on twice", twice)]
        for key, sheet in self.tests.items():
            both = [(name, first[d]) for name, d in zip(sheet.names(), sheet.digests, strict=True) if d in first]
            found.append((f"{'test' if key == TEST else f'{key}:'} images that are trained on too", both))
        return [f"{what}: {len(same)}, the first is {same[0][0]}, the same as {same[0][1]}" for what, same in found if same]


def _other_images(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How two splits differ first, by the digests of their images, or, where one has none, by the names; None if not at all."""
    kept = "digests" in was
    for role in ("train", "val"):
        before, after = ((split["digests"] if kept else split)[role] for split in (was, now))
        if before == after:
            continue
        i = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
        old, new = (split[role][i] if i < len(split[role]) else None for split in (was, now))
        if old == new:
            return f"{old} has changed"
        if old is None or new is None:
            return f"{old} is missing" if new is None else f"{new} is new"
        return f"{new} is drawn instead of {old}"
    return None


def _first_other(was: Tensor, sheet: Sheet) -> int | None:
    """Where a sheet differs first from one that had the numbers `was`; None if nowhere."""
    now = sheet.numbers()
    both = min(len(was), len(now))
    differ = (was[:both] != now[:both]).nonzero()
    return int(differ[0, 0]) if len(differ) else both if len(was) != len(now) else None
