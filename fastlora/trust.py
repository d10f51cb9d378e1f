"""The Triton kernels, once they are known to be right on this GPU: the signatures of fastlora.eager.

At the first call of a class of calls (verdicts.Kind) on a GPU that kernels/tiles.py has no measurement of, the kernels are
compared with eager by the rule of fastlora.budget, with the call's own shapes, strides, alignment, seed and rows. The values
are drawn for it: B is zero when training begins, a first fp16 step overflows, one token attends to itself alone, and each would
hide an error. What is right serves from then on. For what is wrong, or fails to compile or to launch, eager serves, which is
said once. The verdict is kept for later processes. In the capture of a CUDA graph nothing can be compared: eager serves a class
that is not known yet.
"""

from __future__ import annotations

import dataclasses
import functools
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
from torch.utils._python_dispatch import _disable_current_modes

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
    planes = rng.bit_planes(spec.dropout) if arguments["seed"] is not None else (0, 0)
    call = tiles.Call(tiles.architecture(x.device), tiles.precision_of(x.dtype), tiles.padded_rank(a.shape[1]), planes[1] > 0)
    n, k = arguments["weight"].shape
    return Kind(direction, call, x.dtype, (a.dtype, b.dtype), spec.active, n, k, planes, **more)


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
    if not all(type(t) in (Tensor, nn.Parameter) for t in call.arguments.values() if isinstance(t, Tensor)):
        _say_once(book, call.kind, "its tensors are fake, or of a class of their own")
        return call.run(eager)
    if (served := book.served.get(call.kind)) is None:
        if not _capturing(call.x):
            with _lock:
                return _first(call, book)
        verdict, plan = _known(book, call.kind)
        if verdict is None or not verdict.right:
            _say_once(book, call.kind, "a CUDA graph is captured, and nobody has compared the kernel before")
            return call.run(eager)
        served = Served(_kernels(), {"plan": plan})
    try:
        return call.run(served.module, **served.options)
    except Exception as error:  # a size or a stride that is compiled anew, say
        if served.module is eager or _capturing(call.x):
            raise
        return _fall_back(call, book, _failure(error, call, book))


def _fall_back(call: Call, book: Book, verdict: Verdict) -> Any:
    """Answer by eager, from now on; where it raises too the arguments are at fault, and there is no verdict."""
    result = call.run(eager)
    book.note(call.kind, verdict)
    log.warning("eager serves instead of the Triton kernel on %s: %s: %s", book.key.gpu, call.kind, verdict.what)
    book.served[call.kind] = Served(eager, {})
    return result


@functools.lru_cache(maxsize=256)
def _say_once(book: Book, kind: Kind, why: str) -> None:
    log.info("eager serves instead of the Triton kernel on %s: %s: %s", book.key.gpu, kind, why)


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
            return _fall_back(call, book, _failure(error, call, book))
        if new:
            book.note(kind, verdict)
        book.served[kind] = Served(_kernels(), {"plan": plan})
        return result
    if new:
        return _fall_back(call, book, verdict)
    _say_once(book, kind, verdict.what)
    book.served[kind] = Served(eager, {})
    return call.run(eager)


def judge(call: Call, book: Book, plan: Plan | None = None) -> Verdict | None:
    """Compare the kernels with eager on values drawn for a call; None where it has no rows.

    Nothing is noted in the book, unless the kernels leave the GPU unusable. Modes that watch torch's operations
    (checkpointing's, a counter of FLOPs) do not see it.

    Raises:
        RuntimeError: they do; the verdict is noted.
    """
    with _disable_current_modes(), torch.no_grad():
        return _judge(call, book, plan)


def _judge(call: Call, book: Book, plan: Plan | None) -> Verdict | None:
    if len(call.x) == 0:
        return None
    _settle(call.x)  # what went wrong before is not the kernels' fault
    try:
        call = _drawn(call)
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


def _drawn(call: Call) -> Call:
    """The call with other values: W and A of order 1/√K, the rest of order 1, so that results are of order 1.

    Others each time: what a kernel leaves unwritten must not hold the last answer.
    """
    generator = torch.Generator(call.x.device).manual_seed(next(_draws))
    small = call.kind.k**-0.5
    sizes = {"x": 1.0, "dy": 1.0, "s": 1.0, "weight": small, "bias": 1.0, "a": small, "b": 1.0}

    def like(tensor: Tensor, size: float) -> Tensor:
        # the same strides, and the same place within 16 bytes: they decide what Triton compiles
        before = tensor.data_ptr() % 16 // tensor.element_size()
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        # values that the compute dtype holds too: the three answers then start from the same numbers
        values = torch.empty(before + last + 1, dtype=call.x.dtype, device=tensor.device).normal_(0, size, generator=generator)
        return values.to(tensor.dtype).as_strided(tensor.shape, tensor.stride(), before)

    own = {name: call.arguments.get(name) for name in sizes}
    return call.but(**{name: like(t, sizes[name]) for name, t in own.items() if t is not None and t.numel()})


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
