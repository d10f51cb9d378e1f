"""The Triton kernels, once they are known to be right on this GPU: the signatures of fastlora.eager.

At the first call of a class of calls (verdicts.Kind) on a GPU that kernels/tiles.py has no measurement of, the kernels are
compared with eager on the call's own x, W, s, dy and mask, by the rule of fastlora.budget. The adapters alone are drawn for it:
B is zero when training begins, and would hide an error in all that it multiplies. What is right serves from then on, what is
wrong, or fails to compile or to launch, never does: eager serves instead, which is said once. The verdict is kept for later
processes. In the capture of a CUDA graph nothing can be compared: eager serves a class that is not known yet.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import subprocess
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import eager, rng, verdicts
from .budget import Maxima, by_group
from .config import OpSpec
from .kernels import tiles
from .kernels.tiles import Plan
from .verdicts import Book, Kind, Served, Verdict

__all__ = ["Call", "backward", "forward", "judge"]

log = logging.getLogger("fastlora")
# The truth is computed for so many bytes of float64 rows at a time: with W in float64, some 200 MB.
_CHUNK = 2**27
_RESULTS = {"forward": ("y", "s"), "backward": ("dx", "da", "db")}
_lock = threading.Lock()
_draws = itertools.count()


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of one direction: its class, and its arguments by the names that eager and the kernels give them."""

    kind: Kind
    arguments: dict[str, Any]

    @classmethod
    def forward(cls, **arguments: Any) -> Call:
        """A call of `forward`."""
        return cls(_kind("forward", arguments, bias=arguments["bias"] is not None), arguments)

    @classmethod
    def backward(cls, **arguments: Any) -> Call:
        """A call of `backward`."""
        return cls(_kind("backward", arguments, needs=arguments["needs"]), arguments)

    @property
    def x(self) -> Tensor:
        """Its input (M, K)."""
        return self.arguments["x"]

    def run(self, module: ModuleType, **options: Any) -> Any:
        """The answer of `module`, eager or the kernels."""
        return getattr(module, self.kind.direction)(**self.arguments, **options)

    def results(self, module: ModuleType, **options: Any) -> dict[str, Tensor | None]:
        """The same by name."""
        return dict(zip(_RESULTS[self.kind.direction], self.run(module, **options), strict=True))

    def but(self, **changes: Any) -> Call:
        """The call with other arguments, where it has such."""
        return dataclasses.replace(self, arguments=self.arguments | {k: v for k, v in changes.items() if k in self.arguments})


def _kind(direction: Any, arguments: dict[str, Any], **more: Any) -> Kind:
    x, a, b, spec = (arguments[name] for name in ("x", "a", "b", "spec"))
    dropout = arguments["seed"] is not None and rng.drop_rate(spec.dropout) > 0
    call = tiles.Call(tiles.architecture(x.device), tiles.precision_of(x.dtype), tiles.padded_rank(a.shape[1]), dropout)
    return Kind(direction, call, x.dtype, (a.dtype, b.dtype), spec.active, *arguments["weight"].shape, **more)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, spec: OpSpec, seed: Tensor | None, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `fastlora.eager.forward`, by the kernels where they are known to be right."""
    return _serve(Call.forward(x=x, weight=weight, bias=bias, a=a, b=b, spec=spec, seed=seed, rows=rows))


def backward(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, spec: OpSpec, seed: Tensor | None,
    rows: Tensor | None, needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """As `fastlora.eager.backward`, by the kernels where they are known to be right; each `needs` is judged by itself."""
    return _serve(Call.backward(dy=dy, x=x, s=s, weight=weight, a=a, b=b, spec=spec, seed=seed, rows=rows, needs=needs))


def _kernels() -> ModuleType:
    from .kernels import lora_linear  # Triton only where it is used: fastlora imports without it

    return lora_linear


def _serve(call: Call) -> Any:
    book = verdicts.book(call.x.device)
    if (served := book.served.get(call.kind)) is not None:
        return call.run(served.module, **served.options)
    if _capturing(call.x):
        verdict, plan = _known(book, call.kind)
        return call.run(_kernels(), plan=plan) if verdict is not None and verdict.right else call.run(eager)
    if not all(type(t) in (Tensor, nn.Parameter) for t in call.arguments.values() if isinstance(t, Tensor)):
        return call.run(eager)  # fake tensors and their like: nothing runs on the GPU
    with _lock:
        return _first(call, book)


def _known(book: Book, kind: Kind) -> tuple[Verdict | None, Plan | None]:
    """What is known of a class, None if nothing, and the plan to run instead of the table's row."""
    if (choice := book.choices.get(kind)) is not None:
        return Verdict(choice.plan is not None, what="measured slower"), choice.plan
    if book.measured(kind):
        return Verdict(True), None
    return book.verdicts.get(kind), None


def _first(call: Call, book: Book) -> Any:
    """Answer the first call of a class in this process, and judge the kernels by it if nobody did."""
    kind = call.kind
    verdict, plan = _known(book, kind)
    new = verdict is None
    verdict = judge(call, book) if verdict is None else verdict
    if verdict is None:
        return call.run(eager)
    if verdict.right:
        try:
            result = call.run(_kernels(), plan=plan)
        except Exception as error:  # the machine may have changed: no C compiler any more
            verdict, new = _failure(error, call, book), True
    if not verdict.right:
        result = call.run(eager)  # where it raises too the arguments are at fault, and there is no verdict
    if new:
        book.note(kind, verdict)
    if not verdict.right:
        level = logging.WARNING if new else logging.INFO
        log.log(level, "eager serves instead of the Triton kernel on %s: %s: %s", book.key.gpu, kind, verdict.what)
    book.served[kind] = Served(_kernels(), {"plan": plan}) if verdict.right else Served(eager, {})
    return result


@torch.no_grad()
def judge(call: Call, book: Book, plan: Plan | None = None) -> Verdict | None:
    """Compare the kernels with eager on a call; None where its values tell nothing (all zero, infinite, none at all).

    Nothing is noted in the book, unless the kernels leave the GPU unusable.

    Raises:
        RuntimeError: they do; the verdict is noted.
    """
    names = ("x",) if call.kind.direction == "forward" else ("dy", "x")[: 1 + call.kind.needs[1]]
    if not all(_telling(call.arguments[name]) for name in names):
        return None
    try:
        call = _with_drawn_adapters(call)
        _settle(call.x)  # what went wrong before is not the kernels' fault
    except torch.OutOfMemoryError as error:
        return _failure(error, call, book)
    try:
        got = call.results(_kernels(), plan=plan)
        _settle(call.x)
    except Exception as error:  # Triton raises many types, from compilers and drivers
        return _failure(error, call, book)
    try:
        numbers = _numbers(call, got)
    except Exception as error:
        return dataclasses.replace(_failure(error, call, book), lasting=False)
    if not all(math.isfinite(n.eager) and math.isfinite(n.truth) for n in numbers.values()):
        return None
    dtype = call.kind.dtype
    wrong = [f"{name}: {n.words(dtype)}" for name, n in numbers.items() if not n.ok(dtype)]
    worst = max(n.share(dtype) for n in numbers.values())
    return Verdict(not wrong, worst if math.isfinite(worst) else None, "; ".join(wrong))


def _telling(values: Tensor) -> bool:
    if values.numel() == 0:
        return False
    low, high = torch.aminmax(values)
    return bool(low.isfinite() & high.isfinite() & ((low != 0) | (high != 0)))


def _with_drawn_adapters(call: Call) -> Call:
    """A of order 1/√K and B of order 1, others each time: what a kernel leaves unwritten must not hold the last answer."""
    generator = torch.Generator(call.x.device).manual_seed(next(_draws))

    def like(adapter: Tensor, size: float) -> Tensor:
        # values that the compute dtype holds too: the three answers then start from the same numbers
        return torch.empty_like(adapter).normal_(0, size, generator=generator).to(call.x.dtype).to(adapter.dtype)

    return call.but(a=like(call.arguments["a"], call.kind.k**-0.5), b=like(call.arguments["b"], 1.0))


def _numbers(call: Call, got: dict[str, Tensor | None]) -> dict[str, Any]:
    """What the rule compares, by result and group; the truth is eager in float64."""
    spec, needs, maxima = call.arguments["spec"], call.kind.needs, Maxima()
    whole = {name: call.arguments.get(name) for name in ("weight", "bias", "a", "b")}
    exact = call.but(**{name: None if value is None else value.double() for name, value in whole.items()})
    sums: dict[str, Tensor] = {}
    for rows in _chunks(call):
        mine = {name: t[rows] for name, t in got.items() if t is not None and name not in ("da", "db")}
        truth = _part(exact, rows, torch.float64).results(eager)
        for name in ("da", "db"):
            if (part := truth.pop(name, None)) is not None:
                sums[name] = sums[name] + part if name in sums else part
        if mine:
            plain = _part(call, rows).but(needs=(True, False, False)).results(eager)
            maxima.add(*(by_group(spec, values) for values in (mine, plain, truth)))
    if sums:
        plain = call.but(needs=(False, *needs[1:])).results(eager)
        maxima.add(*(by_group(spec, values) for values in (got, plain, sums)))
    return maxima.read()


def _chunks(call: Call) -> Iterator[slice]:
    step = max(1, _CHUNK // (8 * (4 * call.kind.k + 5 * call.kind.n)))
    for start in range(0, len(call.x), step):
        yield slice(start, min(start + step, len(call.x)))


def _part(call: Call, rows: slice, dtype: torch.dtype | None = None) -> Call:
    """Some rows of a call, each with the mask that it has in the whole."""
    cut = {name: call.arguments[name][rows] for name in ("x", "dy", "s") if name in call.arguments}
    if dtype is not None:
        cut = {name: value.to(dtype) for name, value in cut.items()}
    identity = call.arguments["rows"]
    here = torch.arange(rows.start, rows.stop, device=call.x.device) if identity is None else identity[rows]
    return call.but(rows=here, **cut)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _settle(x: Tensor) -> None:
    """Wait for the GPU: what went wrong on it is raised here."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _failure(error: Exception, call: Call, book: Book) -> Verdict:
    """The verdict after an error: lasting where the kernels are at fault, not for a lack of memory or of a C compiler.

    Raises:
        RuntimeError: the GPU cannot be used any more in this process; the verdict is noted.
    """
    what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return Verdict(False, what=f"no memory left for its check ({what})", lasting=False)
    try:
        _settle(call.x)
    except Exception:
        book.note(call.kind, Verdict(False, what=what, stopped=True))
        raise RuntimeError(
            f"the GPU stopped at the first use of a Triton kernel on {book.key.gpu}: {call.kind}: {what}. This process cannot"
            " go on: start the program again, it will use eager for these calls"
        ) from error
    machine = isinstance(error, (OSError, ImportError, subprocess.SubprocessError)) or "C compiler" in str(error)
    return Verdict(False, what=what, lasting=not machine)
