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
from torch import Tensor

from fastlora import rng
from fastlora.config import OpSpec
from fastlora.fastest import Layer, words
from fastlora.kernels import candidates, tiles
from fastlora.kernels.tiles import Plan
from fastlora.testing import poisoned
from fastlora.trust import Call, judge
from fastlora.verdicts import Book, Kind, Verdict

__all__ = ["Judged", "TableRow", "capture_here", "forms", "judged", "mask_bits", "products", "replays", "table_rows", "verdict"]

RANKS = (16, 32, 64, 128)
# So many rows or columns share one sum, each with a power of two of its own: bfloat16 rounds 31 by an eighth at most.
BITS = 5
SITE = 5
Capture = Callable[[Callable[[], None]], Callable[[], None]]


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

    @property
    def kind(self) -> tiles.Call:
        """The class as the table knows it."""
        layer = self.layer
        return tiles.Call(tiles.architecture(layer.device), self.precision, tiles.padded_rank(layer.rank), layer.dropout)

    def calls(self) -> tuple[Call, Call]:
        """A forward, and a backward that is asked for all gradients."""
        with products(self.precision):
            forward, backward = itertools.islice(self.layer.calls(self.m), 2)
        return forward, backward


def packed(device: torch.device, k: int, dtype: torch.dtype, rank: int, dropout: float, width: int | None = None) -> Layer:
    """q, k, v in one layer, k -> 3k, with float32 adapters, as fastlora.patch makes it. width: of a group, instead of k."""
    spec = OpSpec(0.5, dropout, SITE, (0, 1, 2), (True, True, True))
    return Layer(device, dtype, 3 * (width or k), k, rank, True, torch.float32, spec)


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
    """What became of one class of calls: the plan that serves, its error as a share of what is allowed, those that are red."""

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
    dropout: float = 0.25, identities: bool = True, rank: int = 16, width: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Every bit of the mask, of every group, in s, dx and dA, is that of fastlora.rng.

    Args:
        plan: instead of the table's.
        dtype: of x; float32 runs in the products that torch allows now.
        identities: whether rows have identities of their own, up to 2**40, instead of their numbers.
        width: columns of y in each group, at least `rank`; k by default.

    The inputs are such that a result is a bit, or a sum of BITS of them, each times a power of two of its own:

        s     x = 1; a row of A has powers of two at BITS columns, 0 elsewhere
        dx    W = 0, A = 1; dy B = 1 in one group, 0 in the others
        dA    x = 1; dy B has powers of two at BITS rows, 0 elsewhere
    """
    from fastlora.kernels import lora_linear as kernels  # Triton only where it is used

    left = 1.0 - rng.drop_rate(dropout)  # as the scale of dx and dA it takes 1 / (1 - drop rate) off again
    spec = OpSpec(left, dropout, SITE, tuple(range(groups)), (True,) * groups)
    seed = torch.tensor([12345 - 2**62], device=device)
    rows = torch.randint(0, 2**40, (m,), generator=torch.Generator().manual_seed(0)).to(device) if identities else None
    who = torch.arange(m, device=device) if rows is None else rows
    keep = [rng.keep_mask(seed, SITE, group, who, k, dropout) for group in range(groups)]
    call = tiles.Call(tiles.architecture(device), tiles.precision_of(dtype), tiles.padded_rank(rank), True)
    used, named = plan or tiles.choose(call), "with identities" if identities else "by number"
    where = f"{dtype}, dropout {dropout:g}, rows {named}, {words(used, 'forward')}, {words(used, 'backward')}"

    wide = width or k
    x, weight = torch.ones(m, k, dtype=dtype, device=device), torch.zeros(groups * wide, k, dtype=dtype, device=device)
    a, b = torch.zeros(groups, rank, k, device=device), torch.eye(wide, rank, device=device).repeat(groups, 1)
    s, dy = x.new_zeros(m, groups * rank), x.new_zeros(m, groups * wide)
    bias = x.new_zeros(groups * wide)  # as the calls of `table_rows` have one, so that nothing is compiled anew

    def backward() -> tuple[Tensor, Tensor]:
        with poisoned():
            dx, da, _ = kernels.backward(dy, x, s, weight, a, b, spec, seed, rows, (True, True, True), plan=plan)
        assert dx is not None and da is not None
        return dx, da

    for first in range(0, k, rank * BITS):
        at = torch.arange(first, min(first + rank * BITS, k), device=device)
        a.zero_()[:, (at - first) // BITS, at] = 2.0 ** ((at - first) % BITS)
        with poisoned():
            _, got = kernels.forward(x, weight, bias, a, b, spec, seed, rows, plan=plan)
        for group, mine in enumerate(got.split(rank, 1)):
            want = keep[group].float() @ a[group].T
            _same(mine.float() * left, want, f"s of group {group}, columns {first} to {int(at[-1])} of x", where)
    a.fill_(1)
    for group in range(groups):
        dy.zero_()[:, group * wide] = 1
        _same(backward()[0], keep[group], f"dx of group {group}", where)
    for first in range(0, m, rank * BITS):
        at = torch.arange(first, min(first + rank * BITS, m), device=device)
        powers = torch.zeros(rank, len(at), device=device)
        powers[(at - first) // BITS, at - first] = 2.0 ** ((at - first) % BITS)
        dy.zero_()
        for group in range(groups):
            dy[at, group * wide : group * wide + rank] = powers.T.to(dtype)
        for group, mine in enumerate(backward()[1]):
            want = powers @ keep[group][at].float()
            _same(mine, want, f"dA of group {group}, rows {first} to {int(at[-1])} of x", where)
    kept = sum(float(mask.float().mean()) for mask in keep) / groups
    return {"bits": 3 * groups * m * k, "kept": round(kept, 6), "rank": rank, "what": where}


def _same(got: Tensor, want: Tensor, what: str, where: str) -> None:
    """Raise AssertionError where a sum of bits is another one; NaN is."""
    wrong = ~((got.float() - want.float()).abs() < 0.25)
    if wrong.any():
        i, j = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"the mask of {what} is not fastlora.rng's: {int(wrong.sum())} of {wrong.numel()} sums of bits differ, the first at"
            f" [{i}, {j}]: got {float(got[i, j]):g}, expected {float(want[i, j]):g} ({where})"
        )


def capture_here(device: torch.device) -> Capture:
    """How a function is made repeatable: one CUDA graph; on a CPU it is just called again."""
    from fastlora.fewshot.engines import capture

    return capture if device.type == "cuda" else lambda function: function


def replays(
    device: torch.device, m: int, k: int, times: int = 20, *, dtype: torch.dtype = torch.bfloat16, dropout: float = 0.25,
    rank: int = 16, width: int | None = None, plan: Plan | None = None, capture: Capture | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Forward and backward in one CUDA graph give, at every replay, the bits of a plain call with the same seed.

    All that the kernels write is NaN before each replay. A seed that is changed in place changes the mask.

    Args:
        width: columns of y in each of three groups; k by default.
        plan: instead of the table's.
        capture: function -> a function that does the same again; `capture_here` by default.
    """
    from fastlora.kernels import lora_linear as kernels

    forward, backward = itertools.islice(packed(device, k, dtype, rank, dropout, width).calls(m), 2)
    seed: Tensor = forward.arguments["seed"]
    found: dict[str, Tensor] = {}

    def step() -> None:
        # what fills torch.empty with NaN is captured too, so that partial sums are poisoned at each replay
        with poisoned(), torch.no_grad():
            results = forward.results(kernels, plan=plan)
            results |= backward.but(s=results["s"]).results(kernels, plan=plan)
        found.update({name: result for name, result in results.items() if result is not None})

    plain = []
    for value in (1, 2):  # what is compiled and loaded at first use is so before the capture
        seed.fill_(value)
        step()
        plain.append({name: result.clone() for name, result in found.items()})
    assert not torch.equal(plain[0]["s"], plain[1]["s"]), "another seed does not change the mask"
    seed.fill_(1)
    replay = (capture or capture_here(device))(step)
    for turn in range(times + 1):
        if turn == times:
            seed.fill_(2)
        for result in found.values():
            result.fill_(torch.nan)
        replay()
        for name, want in plain[turn == times].items():
            differ = int((found[name] != want).sum())
            what = f"replay {turn + 1} of forward and backward" + (", the first with another seed" if turn == times else "")
            assert not differ, f"{what}: {differ} of {want.numel()} values of {name} are not those of a plain call"
    return {"replays": times + 1, "values": sum(result.numel() for result in found.values())}
