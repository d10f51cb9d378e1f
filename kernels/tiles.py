"""Which form and which tiles each call uses: one table, by class of shape and architecture.

A row is found by architecture (sm_80, sm_90, sm_100; others take the row of the closest older one, AMD and the interpreter
that of sm_80) and by class: precision ("half", "tf32", "ieee"), padded rank (at most 32, 64, 128), dropout or not.
`measured` holds the times that chose a row; a row without any was chosen by what the compiler reports (README.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch

__all__ = [
    "ARCHITECTURES",
    "MAX_RANK",
    "TABLE",
    "Call",
    "Measured",
    "Plan",
    "Row",
    "Tile",
    "architecture",
    "assuming",
    "choose",
    "multiprocessors",
    "padded_rank",
    "precision_of",
    "row_of",
    "span",
]

Precision = Literal["half", "tf32", "ieee"]
ARCHITECTURES = (80, 90, 100)
# Computing s of some rows takes about as long as so many columns of their y: 2.8 µs beside 39 for 768 (docs/performance.md).
SHRINK_COLUMNS = 64


@dataclasses.dataclass(frozen=True)
class Tile:
    """One launch configuration: rows of tokens, columns of N and of K (0 where unused), warps, pipeline stages.

    per_sm: how many programs of a persistent kernel share a multiprocessor; sets the number of partial sums.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    per_sm: int = 1

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} {self.warps}w {self.stages}s"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one class of calls is run.

    Args:
        forward, backward: tiles of the two big products.
        shrink, ds_db, da: tiles of the light passes (n or k of no use there is 0). In one_pass_forward shrink's k and stages
            are those of the loop that computes s.
        one_pass_forward: one launch computes s and then y; else the shrink pass computes s of all groups.
        one_pass_backward: ds and dB are computed beside dy W; else by a pass over dy.
        da_in_epilogue: dA is computed from x and ds beside dx; else by a pass over both.
        groups_together: the light passes over x serve all groups from one reading; else a group each, for large ranks.
    """

    forward: Tile
    backward: Tile
    shrink: Tile
    ds_db: Tile
    da: Tile
    one_pass_forward: bool
    one_pass_backward: bool
    da_in_epilogue: bool
    groups_together: bool = True


@dataclasses.dataclass(frozen=True)
class Call:
    """The class of one call. rank: padded to 16, 32, 64 or 128."""

    arch: int
    precision: Precision
    rank: int
    dropout: bool


class Measured(NamedTuple):
    """Medians of forward and backward of packed q, k, v at `rows` rows of x, in microseconds, both in one run on one GPU.

    Printed by benchmarks/device.py, whose raw rows lie in benchmarks/results/gpu/. A plain tuple: torch.compile reads it.
    """

    gpu: str
    rows: int
    triton: float
    eager: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table: the classes it serves, and their plan.

    Args:
        max_rank: the largest padded rank.
        measured: fewest rows of x first; empty says "not yet measured".
    """

    archs: tuple[int, ...]
    precision: Precision
    max_rank: int
    dropout: tuple[bool, ...]
    plan: Plan
    measured: tuple[Measured, ...] = ()

    def serves(self, call: Call) -> bool:
        return (
            call.arch in self.archs
            and call.precision == self.precision
            and call.rank <= self.max_rank
            and call.dropout in self.dropout
        )


OFF, ON, ANY = (False,), (True,), (False, True)
# The first row that serves a call is its row. Under dropout, tiles of x span a multiple of the 128 columns of one Philox call.
TABLE = (
    Row((90,), "half", 16, OFF, Plan(
        forward=Tile(128, 256, 64, 8, 3), backward=Tile(128, 64, 128, 8, 4),
        shrink=Tile(32, 0, 256, 4, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 4, 3, 2),
        one_pass_forward=True, one_pass_backward=True, da_in_epilogue=True)),
    Row((90,), "half", 16, ON, Plan(
        forward=Tile(128, 256, 64, 8, 3), backward=Tile(128, 64, 128, 8, 4),
        shrink=Tile(32, 0, 256, 4, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(64, 0, 128, 4, 3, 2),
        one_pass_forward=True, one_pass_backward=True, da_in_epilogue=False)),
    Row((90,), "half", 32, OFF, Plan(
        forward=Tile(128, 256, 64, 8, 3), backward=Tile(128, 64, 128, 8, 4),
        shrink=Tile(32, 0, 128, 4, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 4, 3, 2),
        one_pass_forward=True, one_pass_backward=True, da_in_epilogue=False)),
    Row((90,), "half", 32, ON, Plan(
        forward=Tile(128, 256, 64, 8, 3), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 4, 3, 2),
        one_pass_forward=True, one_pass_backward=False, da_in_epilogue=False)),
    Row((100,), "half", 16, OFF, Plan(
        forward=Tile(128, 128, 64, 8, 3), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 256, 8, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 8, 2, 2),
        one_pass_forward=True, one_pass_backward=True, da_in_epilogue=False)),
    Row((100,), "half", 32, OFF, Plan(
        forward=Tile(128, 128, 64, 8, 4), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 8, 2, 2),
        one_pass_forward=True, one_pass_backward=True, da_in_epilogue=False)),
    Row((100,), "half", 16, ON, Plan(
        forward=Tile(128, 128, 64, 8, 3), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 256, 8, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 8, 2, 2),
        one_pass_forward=True, one_pass_backward=False, da_in_epilogue=False)),
    Row((100,), "half", 32, ON, Plan(
        forward=Tile(128, 128, 64, 8, 4), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 3), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 8, 2, 2),
        one_pass_forward=True, one_pass_backward=False, da_in_epilogue=False)),
    Row((90,), "half", 64, ANY, Plan(
        forward=Tile(128, 128, 64, 8, 3), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 8, 3), da=Tile(64, 0, 128, 4, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((100,), "half", 64, ANY, Plan(
        forward=Tile(128, 128, 64, 8, 3), backward=Tile(128, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 8, 3), da=Tile(32, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((90,), "half", 128, ANY, Plan(
        forward=Tile(128, 128, 64, 8, 3), backward=Tile(64, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 8, 3), da=Tile(64, 0, 128, 4, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((100,), "half", 128, ANY, Plan(
        forward=Tile(128, 128, 64, 8, 3), backward=Tile(64, 64, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 8, 3), da=Tile(32, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((80,), "half", 32, ANY, Plan(
        forward=Tile(128, 128, 32, 8, 4), backward=Tile(128, 32, 128, 8, 4),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 4, 3, 2), da=Tile(32, 0, 128, 8, 2, 2),
        one_pass_forward=True, one_pass_backward=False, da_in_epilogue=False)),
    Row((80,), "half", 64, ANY, Plan(
        forward=Tile(128, 128, 32, 8, 4), backward=Tile(64, 32, 128, 8, 4),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 8, 2), da=Tile(32, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((80,), "half", 128, ANY, Plan(
        forward=Tile(128, 128, 32, 8, 4), backward=Tile(32, 32, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 64, 0, 8, 2), da=Tile(32, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((80, 90), "tf32", 32, ANY, Plan(
        forward=Tile(128, 128, 32, 8, 3), backward=Tile(64, 32, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 32, 0, 8, 2), da=Tile(32, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((80, 90, 100), "tf32", 64, ANY, Plan(
        forward=Tile(128, 128, 32, 8, 3), backward=Tile(32, 32, 128, 8, 3),
        shrink=Tile(32, 0, 128, 8, 2), ds_db=Tile(64, 32, 0, 8, 2), da=Tile(32, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
    Row((80, 90, 100), "ieee", 16, ANY, Plan(
        forward=Tile(64, 64, 16, 4, 2), backward=Tile(32, 16, 128, 8, 2),
        shrink=Tile(16, 0, 128, 8, 1), ds_db=Tile(32, 32, 0, 8, 2), da=Tile(16, 0, 128, 8, 2),
        one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False, groups_together=False)),
)  # fmt: skip


# The largest rank that every architecture has a row for: a rank tile beyond it leaves the kernels no registers.
MAX_RANK: dict[Precision, int] = {
    precision: min(
        max(row.max_rank for row in TABLE if row.precision == precision and arch in row.archs) for arch in ARCHITECTURES
    )
    for precision in ("half", "tf32", "ieee")
}


def precision_of(dtype: torch.dtype) -> Precision:
    """The products that inputs of `dtype` get: float32 on tf32 units only where torch allows it."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded_rank(rank: int) -> int:
    """The rank as the kernels see it: a power of two of at least 16, what a product of the tensor cores takes."""
    return max(16, 1 << (rank - 1).bit_length())


@functools.cache
def row_of(call: Call) -> Row:
    """The first row that serves a call: up to rank MAX_RANK of its precision.

    Raises:
        ValueError: a rank beyond that.
    """
    for row in TABLE:
        if row.serves(call):
            return row
    raise ValueError(
        f"rank {call.rank} in {call.precision} has no kernel: at most {MAX_RANK[call.precision]}; use backend='eager'"
    )


def choose(call: Call) -> Plan:
    """The plan of `row_of` a call."""
    return row_of(call).plan


def architecture(device: torch.device) -> int:
    """The row of the table for a device: the newest architecture that is not newer than it."""
    return 80 if device.type != "cuda" or torch.version.hip else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=80)


# What `assuming` puts in place of a device's own number.
_assumed: int | None = None


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 4 in the interpreter, enough for programs to persist over several row tiles."""
    if _assumed is not None:
        return _assumed
    return _multiprocessors(device) if device.type == "cuda" else 4


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@contextlib.contextmanager
def assuming(processors: int) -> Iterator[None]:
    """Within it every device has so many multiprocessors: for compiling what a GPU that is not here would launch."""
    global _assumed
    before, _assumed = _assumed, processors
    try:
        yield
    finally:
        _assumed = before


@functools.cache
def span(tiles_m: int, groups: int, columns: int, tile_n: int, processors: int) -> int:
    """How many tiles of tile_n of a group's columns one program of the one-launch forward takes.

    The split with the shortest makespan: a wave of programs takes as long as one, which computes s first. Of equal ones the
    widest, which draws each bit least often.
    """
    tiles_n = math.ceil(columns / tile_n)

    def makespan(width: int) -> float:
        waves = math.ceil(tiles_m * groups * math.ceil(tiles_n / width) / processors)
        return waves * (SHRINK_COLUMNS + width * tile_n)

    return min(range(tiles_n, 0, -1), key=makespan)
