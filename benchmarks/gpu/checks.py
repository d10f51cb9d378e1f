"""Whether the Triton kernels are right: the table's classes of calls, every bit of the mask, and CUDA graphs.

Each check takes a device and sizes, raises AssertionError saying what is wrong, and returns facts for a row of results. On a
CPU it runs at tiny sizes in Triton's interpreter, whose tl.dot does not know bfloat16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastlora.config import OpSpec
from fastlora.fastest import Layer, words
from fastlora.kernels import candidates, tiles
from fastlora.kernels.tiles import Plan
from fastlora.testing import poisoned
from fastlora.trust import Call, judge
from fastlora.verdicts import Book, Kind, Verdict

__all__ = ["Judged", "TableRow", "capture_here", "forms", "judged", "mask_bits", "products", "replays", "table_rows", "verdict"]

RANKS = (16, 32, 64, 128)
# So many rows or columns share one sum, each with a power of two of its own: what bfloat16 rounds is then far under 1/4.
BITS = 6
SITE = 5
Capture = Callable[[Callable[[], None]], Callable[[], object]]


@contextlib.contextmanager
def products(precision: tiles.Precision) -> Iterator[None]:
    """Within it float32 is multiplied on tf32 units, or is not; nothing changes for half precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before if precision == "half" else precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One class of calls that the tile table serves, at m rows of x."""

    layer: Layer
    precision: tiles.Precision
    m: int

    @property
    def name(self) -> str:
        """As a test's id: "bfloat16 half r16 p=0.25"."""
        dtype = str(self.layer.dtype).removeprefix("torch.")
        return f"{dtype} {self.precision} r{self.layer.rank} p={self.layer.spec.dropout:g}"

    def calls(self) -> tuple[Call, Call]:
        """A forward, and a backward that is asked for all gradients."""
        with products(self.precision):
            forward, backward = itertools.islice(self.layer.calls(self.m), 2)
        return forward, backward


def packed(
    device: torch.device, k: int, dtype: torch.dtype, rank: int, dropout: float, groups: int = 3, width: int | None = None
) -> Layer:
    """q, k, v in one layer, k -> 3k, with float32 adapters, as fastlora.patch makes it. width: of a group, instead of k."""
    spec = OpSpec(0.5, dropout, SITE, tuple(range(groups)), (True,) * groups)
    return Layer(device, dtype, groups * (width or k), k, rank, True, torch.float32, spec)


def table_rows(
    device: torch.device, m: int, k: int, *, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32),
    ranks: Sequence[int] = RANKS, dropouts: Sequence[float] = (0.25, 0.0),
) -> list[TableRow]:  # fmt: skip
    """Every class of calls of packed q, k, v that the table serves: the same list for every architecture.

    float32 comes on tf32 units and without. Ranks above tiles.MAX_RANK are left out.
    """
    kinds: list[tuple[torch.dtype, tiles.Precision]] = []
    for dtype in dtypes:
        kinds += [(dtype, "tf32"), (dtype, "ieee")] if dtype == torch.float32 else [(dtype, "half")]
    return [
        TableRow(packed(device, k, dtype, rank, dropout), precision, m)
        for dtype, precision in kinds
        for rank in ranks
        if tiles.padded_rank(rank) <= tiles.MAX_RANK[precision]
        for dropout in dropouts
    ]


def forms(call: tiles.Call) -> list[Plan]:
    """Every plan that serves a call in one direction or the other: the table's own first, then its other forms and rows."""
    both = candidates.candidates(call, "forward") + candidates.candidates(call, "backward")
    return list(dict.fromkeys(both))


def verdict(call: Call, book: Book, plan: Plan | None = None) -> Verdict:
    """What fastlora.trust says of a plan, the table's by default, with NaN in all memory that a kernel has to write.

    Raises:
        AssertionError: eager's own results are not finite, so that there is nothing to compare with.
        RuntimeError: the kernels left the GPU unusable.
    """
    with poisoned(), products(call.kind.call.precision):
        found = judge(call, book, plan)
    assert found is not None, f"{call.kind}: eager's own results are not finite, nothing to compare with"
    return found


@dataclasses.dataclass(frozen=True)
class Judged:
    """What became of one class: the plan that serves, its largest error as a share of what is allowed, the red plans."""

    kind: Kind
    plan: Plan
    worst: float | None
    red: tuple[tuple[Plan, str], ...]

    @property
    def right(self) -> bool:
        """Whether the table's own plan serves."""
        return not self.red

    def facts(self) -> dict[str, Any]:
        """For a row of results."""
        direction = self.kind.direction
        red = [{"plan": words(plan, direction), "what": what} for plan, what in self.red]
        return {"class": str(self.kind), "serves": words(self.plan, direction), "worst": self.worst, "red": red}

    def __str__(self) -> str:
        red = "; ".join(f"{words(plan, self.kind.direction)}: {what}" for plan, what in self.red)
        return f"{self.kind}: {red or 'right'}"


def judged(call: Call, book: Book) -> Judged:
    """Judge the table's plan for a call, and where it is red the candidates in their order, until one is right.

    Raises:
        AssertionError: none is; or as `verdict`.
        RuntimeError: as `verdict`.
    """
    direction = call.kind.direction
    red: list[tuple[Plan, str]] = []
    for plan in candidates.candidates(call.kind.call, direction):
        found = verdict(call, book, plan)
        if found.right:
            return Judged(call.kind, plan, found.worst, tuple(red))
        red.append((plan, found.what))
    raise AssertionError(f"no plan is right for {call.kind}: " + "; ".join(f"{words(p, direction)}: {what}" for p, what in red))


def mask_bits(
    device: torch.device, m: int, k: int, groups: int = 3, plan: Plan | None = None, dtype: torch.dtype = torch.bfloat16, *,
    dropout: float = 0.25, identities: bool = True, rank: int = 16,
) -> dict[str, Any]:  # fmt: skip
    """Every bit of the mask, of every group, in s, dx and dA, is that of fastlora.rng.

    Args:
        k: columns of x, and of each group of y; at least `rank`.
        plan: instead of the table's.
        dtype: of x; float32 runs in the products that torch allows now.
        identities: whether rows have identities of their own, up to 2**40, instead of their numbers.

    The inputs are such that a result is a bit, or a sum of BITS of them, each times a power of two of its own:

        s     x = 1; a row of A has powers of two at BITS columns, 0 elsewhere
        dx    W = 0, A = 1; dy B = 1 in one group, 0 in the others
        dA    x = 1; dy B has powers of two at BITS rows, 0 elsewhere
    """

    raise NotImplementedError


def capture_here(device: torch.device) -> Capture:
    """How a function is made repeatable: one CUDA graph; on a CPU it is just called again."""
    raise NotImplementedError


def replays(
    device: torch.device, m: int, k: int, times: int = 20, *, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.25,
    rank: int = 16, plan: Plan | None = None, capture: Capture | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Forward and backward in one CUDA graph give, at every replay, the bits of a plain call with the same seed.

    All that the kernels write is NaN before each replay. A seed that is changed in place changes the mask.

    Args:
        plan: instead of the table's.
        capture: function -> a function that does the same again; `capture_here` by default.
    """
    raise NotImplementedError
