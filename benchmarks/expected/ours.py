"""What fastlora's Triton kernels are expected to take, from the plan of the tile table: microseconds of forward and backward.

Instructions are those counted in kernels/README.md; an H100 issues one a clock on each of a multiprocessor's 4 schedulers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from expected.model import CLOCK, COPY, L2, MULTIPROCESSORS, NODE, Expected, triton_tile, waves
from fastlora.kernels import tiles
from shapes import Case

RANK = 16  # ranks up to it are padded to it
SHARED, REGISTERS = 227 * 1024, 65536  # of a multiprocessor
DRAW = 427 / (128 * 256)  # instructions of one of 8 warps that mask an element of x and feed it to the product for s
DS, DB = 130 / 512, 0.5  # of dy W's own time at 128 columns: the product dy B; the turn that reads dy again for dB
PLAIN = 0.3  # of what masking costs: the epilogue's work for an element of x where nothing is dropped


def plan_of(case: Case) -> Any:
    """The tile table's row for an H100."""
    return tiles.choose(tiles.Call(90, "half", tiles.padded_rank(case.rank), case.dropout > 0))


def _resident(tile: Any) -> int:
    """How many programs of a launch fit on a multiprocessor: two hide each other's beginning and end."""
    shared = tile.stages * (tile.m + tile.n) * tile.k * 2
    registers = tile.warps * 32 * min(255, tile.m * tile.n // (tile.warps * 32) + 64)
    return max(1, min(2, SHARED // shared, REGISTERS // registers))


def _issue(elements: float) -> float:
    """Microseconds of masking so many elements of x by 8 warps on 4 schedulers."""
    return 1e6 * DRAW * elements * 8 / 4 / CLOCK


def _pass(nbytes: float) -> float:
    """Microseconds of a light kernel that is bound by memory."""
    return 1e6 * nbytes / COPY + NODE


def _reduced(slots: int, columns: int) -> float:
    """Microseconds of the sum of partial sums over its slots."""
    return _pass(slots * columns * RANK * 4)


def forward(case: Case, plan: Any) -> tuple[float, str]:
    """Microseconds, and their arithmetic."""
    m, k, width = case.m, case.k, case.n // case.groups
    tile = plan.forward
    loop, ends = triton_tile(tile.m, tile.n, k + RANK)
    tiles_m, tiles_n, resident = math.ceil(m / tile.m), math.ceil(width / tile.n), _resident(tile)
    if plan.one_pass_forward:
        span = tiles.span(tiles_m, case.groups, width, tile.n, MULTIPROCESSORS)
        # the mask is drawn while the next copy is on its way
        shrink = max(1e6 * tile.m * k * 2 / (L2 / MULTIPROCESSORS), _issue(tile.m * k) if case.dropout else 0.0)
        first = 0.0
    else:
        span, shrink = 1, 0.0
        first = _pass(2 * m * (k + case.groups * RANK))
    programs = tiles_m * math.ceil(tiles_n / span) * case.groups
    # where two share a multiprocessor, one's ends lie under the other's loop
    time = waves(programs, resident) * resident * (shrink + span * (loop + ends / resident))
    text = f"{programs} programs of {span} × {tile.m}×{tile.n}: {waves(programs, resident) * resident} × ({shrink:.1f} + "
    text += f"{span} × ({loop:.1f} + {ends / resident:.1f})) = {time:.0f} µs"
    return time + first + _pack(case) + NODE, (f"shrink {first:.0f}; " if first else "") + text


def _pack(case: Case) -> float:
    return _pass(6 * (case.groups * RANK * case.k + case.n * RANK))


def backward(case: Case, plan: Any) -> tuple[float, str]:
    """Microseconds, and their arithmetic."""
    m, k, n = case.m, case.k, case.n
    tile = plan.backward
    columns = math.ceil(k / tile.k)
    row_tiles = math.ceil(m / tile.m)
    slots = max(1, min(row_tiles, MULTIPROCESSORS * tile.per_sm // columns))
    loop, ends = triton_tile(tile.m, tile.k, n)
    elements = tile.m * tile.k * case.groups
    masked = _issue(elements) * (1.0 if case.dropout else PLAIN)
    light, text = 0.0, ""
    if plan.one_pass_backward:
        loop *= 1 + DS * 128 / tile.k + DB / columns
        light += _reduced(min(row_tiles, slots * columns), n)
    else:
        two = _pass(2 * m * (n + case.groups * RANK))
        text = f"ds and dB {two:.0f}; "
        light += two + _reduced(min(math.ceil(m / plan.ds_db.m), MULTIPROCESSORS * plan.ds_db.per_sm // case.groups), n)
    if plan.da_in_epilogue:
        # x is read and masked again; sums of the slot are read and written
        masked += _issue(elements) * (1.0 if case.dropout else PLAIN) + 1e6 * 8 * RANK * tile.k * case.groups / (
            L2 / MULTIPROCESSORS
        )
        light += _reduced(slots, case.groups * k)
    else:
        da = _pass(2 * m * (k + case.groups * RANK))
        per = min(math.ceil(m / plan.da.m), MULTIPROCESSORS * plan.da.per_sm // math.ceil(k / plan.da.k))
        light += da + _reduced(per, case.groups * k)
    rounds = math.ceil(row_tiles / slots)
    time = rounds * (loop + ends + masked)
    text += f"{rounds} rounds of {tile.m}×{tile.k} × ({loop:.1f} + {ends:.1f} + {masked:.1f}) = {time:.0f} µs; light kernels "
    return time + light + _pack(case) + NODE, f"{text}{light + _pack(case):.0f}"


def triton(case: Case, plan: Any = None) -> Expected:
    """Packed q, k, v by one plan; the table's own by default."""
    plan = plan or plan_of(case)
    (f, f_text), (b, b_text) = forward(case, plan), backward(case, plan)
    return Expected(f, f"forward {f_text}; backward {b_text}", b)


def changed(case: Case, kernel: str = "", sizes: tuple[int, ...] = (), **forms: bool) -> Any:
    """The table's plan with the tile (m, n, k, warps, stages) of one kernel, and forms, changed."""
    plan = plan_of(case)
    if kernel:
        tile = dataclasses.replace(getattr(plan, kernel), **dict(zip(("m", "n", "k", "warps", "stages"), sizes, strict=True)))
        plan = dataclasses.replace(plan, **{kernel: tile})
    return dataclasses.replace(plan, **forms)


def change(case: Case, phase: str, kernel: str = "", sizes: tuple[int, ...] = (), **forms: bool) -> Expected:
    """One phase with the tile table's row changed as `benchmarks/tune.py` changes it."""
    time, text = {"forward": forward, "backward": backward}[phase](case, changed(case, kernel, sizes, **forms))
    return Expected(time, text) if phase == "forward" else Expected(0.0, text, time)
