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


def why() -> dict[str, str]:
    """What each part's seconds are made of."""
    from . import canary, layers, products, steps, tune

    def both(of: dict[str, float]) -> str:
        return f"{of['large']:g} s at 50432 rows, {of['small']:g} below"

    return {
        "a": f"a class of the table {both(canary.JUDGED)}, for its fp64 truth; attention {canary.ATTENTION:g}, a step "
        f"{canary.STEP:g}; the tests at most {canary.TESTS:g}",
        "b": f"inputs, truth and three graphs {both(layers.SETUP)}; four samples of {layers.SAMPLE:g}",
        "c": f"model and optimizer {steps.SETUP:g} s; a gate {steps.GATE:g}, once a contestant; a capture {steps.CAPTURE:g}; "
        f"{steps.WARM_UP} + {steps.STEPS} steps as long as docs/performance.md predicts",
        "d": f"gate and graph {both(tune.SETUP)}; a sample of {tune.SAMPLE:g}",
        "e": f"operands, truth and graph {products.SETUP:g} s; a sample of {products.SAMPLE:g}",
        "f": "as b",
        "h": f"{layers.DIGEST:g} s to copy 0.6 GB to the host and hash it",
        "g": f"Inductor {layers.COMPILES:g} s a layer, {steps.INDUCTOR:g} a step; else as b and c",
        "i": "compute-sanitizer on real tiles, and random shapes, as many as fit",
    }


def table(items: list[Item]) -> str:
    """A Markdown table of the parts: what each costs, in order, and why."""
    heads = ("part", "", "items", "kernels to compile", "launches of ours", "expected", "why")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|---|"]
    known: set[str] = set()
    costs = []
    for part, title in PARTS.items():
        mine = [item for item in items if item.part == part]
        if mine:
            costs.append(cost(mine, known))
            known |= kernels_of(mine)
            lines.append(_line(part, title, costs[-1], why()[part]))
    total = Cost(*map(sum, zip(*map(dataclasses.astuple, costs), strict=True)))
    return "\n".join([*lines, _line("", "together", total, "")])


def _line(part: str, title: str, cost: Cost, reason: str) -> str:
    return f"| {part} | {title} | {cost.items} | {cost.kernels} | {cost.launches:,} | {cost.seconds:.0f} s | {reason} |"
