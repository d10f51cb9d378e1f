"""One process at work on the GPU: the items in their order, each row on disk at once, until the time is up."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

import ops
from machine import Ceilings, ceilings
from rows import Rows

from .ahead import Ahead
from .history import History
from .items import Item, Row

__all__ = ["Run", "carry_out"]

T = TypeVar("T")


class Run:
    """What an item is given.

    Args:
        rows: where rows go.
        deadline: time.monotonic() at which it must be over.
        smoke: tiny sizes.
        history: what was done before; it learns what is done now.
        ahead: the kernels being compiled.
    """

    def __init__(self, device: torch.device, rows: Rows, deadline: float, smoke: bool, history: History, ahead: Ahead) -> None:
        self.device, self.rows, self.deadline, self.smoke = device, rows, deadline, smoke
        self.history, self.ahead = history, ahead
        self.broken = False
        self._kept: tuple[object, Any] | None = None
        self._ceilings: Ceilings | None = None

    def left(self) -> float:
        """Seconds until the time is up."""
        return self.deadline - time.monotonic()

    def add(self, row: Row) -> None:
        """Put a row on disk."""
        self.rows.add(row)
        self.history.take(row)

    def ceilings(self) -> Ceilings:
        """GEMM speed and copy bandwidth of this GPU, measured when they are first asked for."""
        if self._ceilings is None:
            dtype, tiny = (torch.float32, True) if self.smoke else (torch.bfloat16, False)
            self._ceilings = ceilings(self.device, dtype, 0.01 if tiny else 1.0, size=128 if tiny else None)
            self.rows.add({"row": "ceilings", **vars(self._ceilings)})
        return self._ceilings

    def keep(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, kept until another key is asked for or another part begins: inputs that contestants share."""
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next is made: the memory of both may not be there
            self._kept = key, make()
        value: T = self._kept[1]
        return value

    def forget(self) -> None:
        """Let go of what was kept, and of the gate's truths: what is measured next must not share memory with them."""
        self._kept = None
        ops.forget()

    def lost(self) -> bool:
        """Whether a kernel has poisoned the CUDA context: after an illegal access every call fails, whatever it is."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.rand(1, device=self.device).item()  # a capture that broke off leaves the generator in it
                self.broken = torch.cuda.current_stream() != torch.cuda.default_stream()
            except RuntimeError:
                self.broken = True
        return self.broken


def carry_out(run: Run, items: list[Item]) -> None:
    """Do what is left of the items, until the time is up or the CUDA context is lost."""
    _collect()
    part = ""
    for item in run.history.left(items):
        if part != item.part:
            run.forget()
            part = item.part
        if run.left() < item.seconds:
            run.add({"row": "left out", "item": item.key, "part": item.part})
            continue
        _do(run, item)
        if run.broken:
            return


def _do(run: Run, item: Item) -> None:
    started = time.monotonic()
    about: Row = item.about | {"item": item.key, "part": item.part}
    run.add({"row": "begin", **about, "expected_s": round(item.seconds, 2)})
    problems = run.ahead.wait(item, run.left())
    waited = time.monotonic() - started
    failed = False
    if problems:
        run.add({"row": "not compiled", **about, "problems": problems, **({"refused": problems} if item.strict else {})})
        print(f"  {item.key}: {problems[0]}", flush=True)
    with compilations() as late:
        if not (problems and item.strict):
            try:
                for row in item.work(run):
                    run.add(about | row)
            except Exception as error:  # one item's failure must not cost the others' numbers; the row keeps it
                failed = True
                broke = {"broke": True} if run.lost() else {}
                print(f"  {item.key}: failed, {repr(error)[:300]}", flush=True)
                run.add({"row": "failed", **about, "failed": repr(error)[:2000], **broke})
    seconds = {"seconds": time.monotonic() - started, "expected_s": item.seconds, "waited_s": waited}
    clock = {name: round(value, 3) for name, value in seconds.items()}
    run.add({"row": "end", **about, "ok": not failed, **clock, "compiled_late": len(late)})
    if run.device.type == "cuda" and not run.broken:
        _collect()
        torch.cuda.empty_cache()


def _collect() -> None:
    """Free what the last item left in cycles; what stays is not looked at again, which took a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def compilations() -> Any:
    """Within it, the names of the kernels that Triton compiles in this process; what is found in its cache does not count."""
    names: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield names
        return

    def listener(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            names.append(str(getattr(src, "name", "")))

    with knobs.compilation.scope():
        knobs.compilation.listener = listener
        yield names
