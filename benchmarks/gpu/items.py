"""The units of work of `benchmarks/device.py`: what each takes, and which kernels it needs compiled. Needs no GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora.kernels.launch import Launch

__all__ = ["CANARY", "PARTS", "Item", "Needed", "Row", "at"]

Row = dict[str, Any]
CANARY = "a"
# In order of worth; h before g, which takes all that is left.
PARTS = {
    CANARY: "the canary: are the kernels right",
    "b": "one layer, forward and backward",
    "c": "whole steps of ViT-B/16",
    "d": "alternatives of the tile table",
    "e": "Triton's plain product beside cuBLAS",
    "f": "one layer at few rows",
    "h": "the same bits as at first",
    "g": "torch.compile of the textbook",
    "i": "the tests marked gpu",
}


def at(rows: int, seconds: dict[str, float]) -> float:
    """Which of the seconds for "large" and "small" numbers of rows these are."""
    return seconds["large" if rows > 10_000 else "small"]


@dataclasses.dataclass(frozen=True)
class Needed:
    """Kernels that an item starts, described so that another process can record their launches again.

    Args:
        record: a function of a module, which records launches on "meta" tensors.
        arguments: its arguments, picklable.
    """

    record: Callable[..., list[Launch]]
    arguments: tuple[Any, ...]

    def launches(self) -> list[Launch]:
        """The launches of one call, in order."""
        return self.record(*self.arguments)


@dataclasses.dataclass(frozen=True)
class Item:
    """One unit of work: done as a whole, or done again.

    Args:
        part: a key of PARTS.
        name: what it is, unique in its part.
        seconds: what it is expected to take on an H100, its kernels compiled.
        work: given the run, yields its rows, each of which is on disk before the next is computed.
        needs: the kernels that it starts.
        calls: how often it makes the calls of `needs`.
        strict: whether it is not done where a kernel did not compile, or may race.
        spare: whether its part counts as finished without it.
        about: what all of its rows say, whatever comes of it: case and contestant.
    """

    part: str
    name: str
    seconds: float
    work: Callable[[Any], Iterable[Row]]
    needs: tuple[Needed, ...] = ()
    calls: int = 0
    strict: bool = False
    spare: bool = False
    about: Row = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        """What it is called in rows."""
        return f"{self.part}: {self.name}"
