"""Which form is fastest for a model's adapted layers on the GPU that it is on: timed when asked for, and kept.

What `fastlora.backend.measure` does. Nothing here runs by itself: a choice by time differs from run to run, so that it is made
once, and by one rank for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import eager, rng, verdicts
from .config import OpSpec
from .kernels import candidates, tiles
from .trust import Call, judge
from .verdicts import Book, Choice, Key, Kind

__all__ = ["Layer", "Measurements", "layers", "measure"]

log = logging.getLogger("fastlora")
# What backward is asked for: all three gradients, and no dx where x needs none, as in a tower's lowest block.
_NEEDS = ((True, True, True), (False, True, True))
# The parts of a packed q, k, v that encoders ask for alone: q of the pooled tokens, k and v of all.
_PARTS = (slice(0, 1), slice(1, 3))


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What `measure` found: the fastest form for each class of calls, and the classes that it left out, with the reason."""

    gpu: str
    found: tuple[tuple[Kind, Choice], ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{kind}: {choice}" for kind, choice in self.found]
        return "\n".join([f"fastest on {self.gpu}:", *lines, *(f"left out: {why}" for why in self.left_out)])


@dataclasses.dataclass(frozen=True)
class Layer:
    """Shapes and constants of one class of adapted layers: what calls on drawn values need."""

    device: torch.device
    dtype: torch.dtype
    n: int
    k: int
    rank: int
    bias: bool
    adapters: torch.dtype
    spec: OpSpec

    @property
    def dropout(self) -> bool:
        """Whether anything is dropped."""
        return rng.drop_rate(self.spec.dropout) > 0

    def calls(self, rows: int) -> Iterator[Call]:
        """A forward, then a backward for each kind of needs, on values of order 1."""
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int, over: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).div_(over).to(self.dtype).to(dtype)

        g = sum(self.spec.active)
        root = self.k**0.5
        x, weight = draw(rows, self.k), draw(self.n, self.k, over=root)
        bias = draw(self.n) if self.bias else None
        a = draw(g, self.rank, self.k, over=root, dtype=self.adapters)
        b = draw(g * (self.n // len(self.spec.active)), self.rank, dtype=self.adapters)
        seed = torch.zeros((), dtype=torch.int64, device=self.device) if self.dropout else None
        same = {"weight": weight, "a": a, "b": b, "spec": self.spec, "seed": seed, "rows": None}
        forward = Call.forward(x=x, bias=bias, **same)
        yield forward
        _, s = forward.run(eager)
        dy = draw(rows, self.n)
        for needs in _NEEDS:
            yield Call.backward(dy=dy, x=x, s=s, needs=needs, **same)


def layers(model: nn.Module) -> list[Layer]:
    """The classes of adapted layers in a patched model, each once: in autocast's dtype where it is on, else in the weights'."""
    found: dict[Any, Layer] = {}
    for module in model.modules():
        spec: Any = getattr(module, "spec", None)
        if not isinstance(spec, OpSpec) or not any(spec.active):
            continue
        layer: Any = module
        weight, (a, _) = layer.base_weight, layer.adapters()
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        width = len(weight) // len(spec.active)
        for part in (slice(0, len(spec.active)), *(_PARTS if hasattr(layer, "project_group") else ())):
            active, groups = spec.active[part], spec.groups[part]
            if not any(active):
                continue
            cut = OpSpec(spec.scale, spec.dropout if layer.training else 0.0, 0, groups, active)
            one = Layer(weight.device, dtype, width * len(active), weight.shape[1], a.shape[1], _has_bias(layer), a.dtype, cut)
            alike = dataclasses.replace(one, spec=dataclasses.replace(cut, scale=1.0, groups=()))
            found.setdefault((alike, rng.bit_planes(cut.dropout)), one)
    return list(found.values())


def _has_bias(layer: Any) -> bool:
    biases = layer._biases() if hasattr(layer, "_biases") else [getattr(layer, name, None) for name in ("bias", "in_proj_bias")]
    return any(bias is not None for bias in biases)


def measure(of: list[Layer], rows: int, left_out: tuple[str, ...]) -> Measurements:
    """Time eager and every plan that serves each class of layers, and keep the fastest; rank 0 for all ranks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return _measure(of, rows, left_out)
    device = of[0].device
    message: list[Any] = [None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            message = [(verdicts.book(device).key, _measure(of, rows, left_out))]
        except Exception as error:  # the others wait for an answer
            failure, message = error, [(None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(message, src=0, device=device if dist.get_backend() == "nccl" else None)
    key, result = message[0]
    if key is None:
        raise RuntimeError(f"rank 0 could not measure: {result}") from failure
    if dist.get_rank() != 0:
        _take(verdicts.book(device), key, result)
    return result


def _take(book: Book, key: Key, result: Measurements) -> None:
    """Use what rank 0 measured, on a GPU of the same kind."""
    if key != book.key:
        log.warning("rank 0 measured on %s, this rank has %s: it goes on with what is known of its own GPU", key, book.key)
        return
    book.read()  # on rank 0's machine it is written already
    for kind, choice in result.found:
        if book.choices.get(kind) != choice:
            book.note(kind, choice)
        book.served.pop(kind, None)


def _measure(of: list[Layer], rows: int, left_out: tuple[str, ...]) -> Measurements:
    from rich.console import Console

    from .progress import bar

    found: dict[Kind, Choice] = {}
    skipped = list(left_out)
    with torch.no_grad(), bar(Console(stderr=True)) as progress:
        task = progress.add_task("timing kernels", total=len(of) * (1 + len(_NEEDS)))
        for layer in of:
            book = verdicts.book(layer.device)
            with torch.cuda.device(layer.device) if layer.device.type == "cuda" else contextlib.nullcontext():  # do_bench's
                for call in layer.calls(rows):
                    known = book.verdicts.get(call.kind)
                    if known is not None and known.stopped:
                        skipped.append(f"{call.kind}: {known}")
                    elif call.kind not in found:
                        found[call.kind] = _fastest(call, rows, book)
                        book.note(call.kind, found[call.kind])
                    progress.advance(task)
    return Measurements(book.key.gpu, tuple(found.items()), tuple(skipped))


def _fastest(call: Call, rows: int, book: Book) -> Choice:
    """The fastest of eager and the plans that are right."""
    from .kernels import lora_linear

    direction = call.kind.direction
    plans = candidates.candidates(call.kind.call, direction)
    eager_time = _time(functools.partial(call.run, eager))
    times: dict[tiles.Plan, float] = {}
    for plan in plans:
        verdict = judge(call, book, plan)
        if verdict is not None and verdict.right:
            times[plan] = _time(functools.partial(call.run, lora_linear, plan=plan))
        elif verdict is not None:
            log.info("not timed on %s: %s, %s: %s", book.key.gpu, call.kind, words(plan, direction), verdict.what)
    table = times.get(plans[0])
    best = min(times, key=lambda plan: times[plan], default=None)
    if best is None or eager_time <= times[best]:
        return Choice(None, rows, eager_time, eager_time, table, "eager")
    return Choice(best, rows, times[best], eager_time, table, words(best, direction))


def words(plan: tiles.Plan, direction: candidates.Direction) -> str:
    """The form of a plan's direction, in words."""
    on = [name for name in candidates.FORMS[direction] if getattr(plan, name)]
    return f"triton {getattr(plan, direction)} ({', '.join(on) or 'no ' + ', no '.join(candidates.FORMS[direction])})"


def _time(call: Callable[[], object]) -> float:
    """Microseconds of a call: the median of Triton's benchmark."""
    import triton

    return 1000 * float(triton.testing.do_bench(call, return_mode="median"))
