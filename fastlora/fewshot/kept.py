"""What a run keeps of its images, to know them again: those drawn in split.json, those of its tests in the checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .datasets import Item
from .digests import Digests
from .errors import UserError
from .job import NEW, TEST
from .sampling import FewShot

__all__ = ["Kept", "Sheet", "split_of"]


def split_of(shots: FewShot, digests: Digests, console: Console) -> dict[str, Any]:
    """Return what split.json holds: the names of the images drawn, by role, and their digests."""
    roles = {"train": shots.train, "val": shots.val}
    names = {role: [item.name for item in items] for role, items in roles.items()}
    return {**names, "digests": {role: digests.of(items, console) for role, items in roles.items()}}


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The images of a test, with the names of their classes and their digests."""

    classes: tuple[str, ...]
    items: tuple[Item, ...]
    digests: list[str]

    def numbers(self) -> Tensor:
        """Return one number an image that stands for its content and its class, int64 (n,)."""
        rows = zip(self.items, self.digests, strict=True)
        said = [f"{item.label} {self.classes[item.label]} {digest}".encode("utf-8", "surrogatepass") for item, digest in rows]
        hashes = [hashlib.blake2b(text, digest_size=8).digest() for text in said]
        return torch.tensor([int.from_bytes(found, "little", signed=True) for found in hashes], dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Kept:
    """The images of a run: what `split_of` gives, and the sheet of each test by its name."""

    split: dict[str, Any]
    sheets: dict[str, Sheet]

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"split": self.split, "tests": {name: sheet.numbers() for name, sheet in self.sheets.items()}}

    def check(self, was: dict[str, Any], data: str, out: Path) -> None:
        """Raise UserError unless these are the images of the run in `out`, whose checkpoint kept `was`, wherever they lie now.

        A checkpoint of an older version kept the names of the images drawn and nothing of the tests.
        """
        said = {TEST: f"the test images in {data}", NEW: f"the test images of the new classes in {data}"}
        changes = [(f"the images in {data}", _other_images(was["split"], self.split))]
        for name, numbers in was.get("tests", {}).items():
            if name in self.sheets:
                changes.append((said.get(name, f"the images in {name}"), _other_test(numbers, self.sheets[name])))
        for what, change in changes:
            if change is not None:
                raise UserError(
                    f"--resume: {what} are not those the run in {out} began with: {change};"
                    " put them back, or begin another run in another --out"
                )

    def trained_on(self) -> list[str]:
        """Return a note on each test of which the run trains on some images."""
        trained = dict(zip(self.split["digests"]["train"], self.split["train"], strict=True))
        notes = []
        for name, sheet in self.sheets.items():
            rows = zip(sheet.items, sheet.digests, strict=True)
            if twins := [(item.name, trained[digest]) for item, digest in rows if digest in trained]:
                where = "" if name == TEST else f"{name}: "
                first, same = twins[0]
                notes.append(
                    f"{where}test images that are trained on too: {len(twins)}, the first is {first}, the same as {same}"
                )
        return notes


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


def _other_test(was: Tensor, sheet: Sheet) -> str | None:
    """How a test differs first from one that had the numbers `was`; None if not at all."""
    now = sheet.numbers()
    if torch.equal(was, now):
        return None
    both = min(len(was), len(now))
    differ = (was[:both] != now[:both]).nonzero()
    first = int(differ[0, 0]) if len(differ) else both
    name = sheet.items[first].name if first < len(now) else "behind the last"
    return f"{len(was)} then, {len(now)} now, the first that differs is {name}"
