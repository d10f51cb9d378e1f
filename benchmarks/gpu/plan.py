"""All items in order of worth, and what they are expected to take: kernels to compile, launches, seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from .ahead import keys
from .items import PARTS, Item

__all__ = ["Cost", "all_items", "cost", "table"]


def all_items(arch: int, device: str, smoke: bool, parts: Iterable[str] = PARTS) -> list[Item]:
    """The items of these parts.

    Args:
        arch: 80, 90 or 100: what is compiled for.
        device: "cuda" or "cpu".
        smoke: tiny sizes.
    """
    # each imports what it measures: open_clip, Triton
    from . import canary, layers, products, steps, suite, tune

    made = {
        "a": lambda: canary.items(arch, device, smoke),
        "b": lambda: layers.items("b", (50432, 6304), arch, device, smoke),
        "c": lambda: steps.items("c", arch, device, smoke),
        "d": lambda: tune.items(arch, device, smoke),
        "e": lambda: products.items(device, smoke),
        "f": lambda: layers.items("f", (1600,), arch, device, smoke),
        "g": lambda: layers.items("g", (50432, 6304), arch, device, smoke) + steps.items("g", arch, device, smoke),
        "h": lambda: layers.bits_items("h", canary.ROWS, arch, device, smoke),
        "i": lambda: [] if smoke else suite.suite_items("i", "gpu and slow", 120.0),
    }
    return [item for part in PARTS if part in parts for item in made[part]()]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What some items take: how many items, kernels that no item before them needs, launches of our kernels, seconds."""

    items: int
    kernels: int
    launches: int
    seconds: float


def kernels_of(items: list[Item]) -> set[str]:
    """The keys of the kernels that items start."""
    return {key for item in items for needed in item.needs for key in keys(needed)}


def cost(items: list[Item], known: Iterable[str] = ()) -> Cost:
    """The cost of items. known: keys of kernels that are compiled already."""
    kernels = kernels_of(items) - set(known)
    launches = sum(item.calls * sum(len(keys(needed)) for needed in item.needs) for item in items)
    return Cost(len(items), len(kernels), launches, sum(item.seconds for item in items))


def table(items: list[Item]) -> str:
    """A Markdown table of the parts: what each costs, in order."""
    lines = ["| part | | items | kernels to compile | launches of ours | expected |", "|---|---|---:|---:|---:|---:|"]
    known: set[str] = set()
    total = Cost(0, 0, 0, 0.0)
    for part, title in PARTS.items():
        mine = [item for item in items if item.part == part]
        if not mine:
            continue
        one = cost(mine, known)
        known |= kernels_of(mine)
        total = Cost(*(a + b for a, b in zip(dataclasses.astuple(total), dataclasses.astuple(one), strict=True)))
        lines.append(f"| {part} | {title} | {one.items} | {one.kernels} | {one.launches:,} | {one.seconds:.0f} s |")
    lines.append(f"| | together | {total.items} | {total.kernels} | {total.launches:,} | {total.seconds:.0f} s |")
    return "\n".join(lines)
