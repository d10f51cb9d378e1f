"""`benchmarks/device.py --tune`: the tile table's alternatives, each checked by the gate, then timed, one change at a time.

Compiling dominates (a backward takes about ten seconds), so every plan of a group of cases is compiled first, by all cores at
once, each in a process of its own that runs the very call; the cubins come back through Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from fastlora.testing import repair_interpreter
from measure import Timing, by_clock, by_graph
from ops import FastLoRA, bind, gate, phase_calls
from shapes import Case, InputSet

if TYPE_CHECKING:
    from device import Run

# (m, n, k, warps, stages): of the forward's x Wᵀ, then of the backward's dy W, where n is the step over N
# With dropout a mask is drawn for whole 128 columns at a time: k = 64 fails in a one-pass forward, and the row says so.
FORWARD: tuple[tuple[int, ...], ...] = (
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4),
    (128, 256, 128, 8, 2), (128, 128, 128, 8, 3), (64, 256, 128, 8, 2), (64, 128, 128, 4, 3),
)  # fmt: skip
BACKWARD: tuple[tuple[int, ...], ...] = (
    (128, 64, 128, 8, 3), (128, 32, 128, 8, 4), (128, 128, 128, 8, 2),
    (64, 64, 256, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 8, 3), (128, 64, 256, 8, 3), (128, 64, 256, 8, 2),
)  # fmt: skip
SMOKE: tuple[tuple[int, ...], ...] = ((32, 16, 128, 4, 1),)
# Other ways of the forward than a tile: what changes in the plan, and the forward's tile where it needs another one.
# kernels/README.md says what is expected of each.
VARIANTS: tuple[tuple[dict[str, bool], tuple[int, ...] | None], ...] = (
    ({"one_pass_forward": True, "ready_bits": True}, (128, 256, 64, 8, 3)),
    ({"one_pass_forward": True, "ready_bits": True}, (128, 128, 64, 8, 4)),
    ({"one_pass_forward": False, "descriptors": True}, None),
    ({"one_pass_forward": True, "descriptors": True}, (128, 256, 128, 8, 2)),
    ({"one_pass_forward": False, "overlap": True}, None),
    ({"one_pass_forward": False, "overlap": True, "descriptors": True}, None),
)
# The light passes: the phase each belongs to, the form that uses it, and its tiles.
LIGHT = {
    "shrink": (
        "forward",
        {"one_pass_forward": False},
        ((16, 0, 128, 4, 4), (32, 0, 128, 4, 3), (64, 0, 128, 4, 2), (64, 0, 128, 4, 3), (64, 0, 128, 8, 2)),
    ),
    "ds_db": ("backward", {"one_pass_backward": False}, ((64, 64, 0, 4, 3), (64, 128, 0, 4, 3), (128, 64, 0, 8, 3))),
    "da": ("backward", {"da_in_epilogue": False}, ((32, 0, 128, 4, 3), (64, 0, 128, 4, 3), (64, 0, 256, 8, 2))),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One plan of fastlora.kernels.tiles for one direction of one case, and what it changes in the table's row."""

    case: Case
    phase: str
    plan: Any
    change: str


def _row(case: Case) -> Any:
    """The table's own plan for a case."""
    from fastlora.kernels import tiles

    arch, precision = tiles.architecture(torch.device(case.device)), tiles.precision_of(case.dtype)
    return tiles.choose(tiles.Call(arch, precision, tiles.padded_rank(case.rank), case.dropout > 0))


def trials(case: Case, smoke: bool) -> list[Trial]:
    """The row as it stands, then each alternative: forms crossed with the tiles of the big product."""
    base = _row(case)
    found: list[Trial] = []
    for phase, shapes, forms in (
        ("forward", FORWARD, ("one_pass_forward",)),
        ("backward", BACKWARD, ("one_pass_backward", "da_in_epilogue")),
    ):
        found.append(Trial(case, phase, base, "as it stands"))
        for shape in SMOKE if smoke else shapes:
            for flags in [(True,) * len(forms)] if smoke else itertools.product((True, False), repeat=len(forms)):
                found += _changed(case, base, phase, phase, shape, dict(zip(forms, flags, strict=True)))
    for changes, other in () if smoke else VARIANTS:
        tile = dataclasses.astuple(base.forward)[:5] if other is None else other
        found += _changed(case, base, "forward", "forward", tile, changes)
    for kernel, (phase, form, shapes) in ({} if smoke else LIGHT).items():
        for shape in shapes:
            found += _changed(case, base, phase, kernel, shape, form)
    return found


def _changed(case: Case, base: Any, phase: str, kernel: str, shape: tuple[int, ...], form: dict[str, bool]) -> list[Trial]:
    """The trial of one kernel's tile in one form, if that is a change."""
    sizes = dict(zip(("m", "n", "k", "warps", "stages"), shape, strict=True))
    tile = dataclasses.replace(getattr(base, kernel), **sizes)
    plan = dataclasses.replace(base, **{kernel: tile}, **form)
    what = f"{kernel} {tile}, " + ", ".join(f"{name}={value}" for name, value in form.items())
    return [] if plan == base else [Trial(case, phase, plan, what)]


@contextlib.contextmanager
def using(plan: Any) -> Iterator[None]:
    """Every call takes this plan instead of the table's row."""
    from fastlora.kernels import tiles

    before, tiles.choose = tiles.choose, lambda call: plan
    try:
        yield
    finally:
        tiles.choose = before


class _Triton(FastLoRA):
    """The Triton backend, in its interpreter too: --smoke proves that this script runs."""

    def missing(self, case: Case) -> None:
        return None


def _compile(trial: Trial) -> str | None:
    """Run the call once; the text of what went wrong, or None."""
    try:
        with using(trial.plan):
            bound = bind(_Triton("triton"), InputSet.draw(trial.case, 1))
            bound.both() if trial.phase == "backward" else bound.forward()
            torch.cuda.synchronize()
    except Exception as error:  # a tile that does not fit the card is a result, not a failure of the run
        return repr(error)[:500]
    return None


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 2), multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def compile_ahead(cases: list[Case]) -> Iterator[None]:
    """Fill Triton's cache with the kernels of these cases while the body runs, and wait for the last one."""
    with _pool() as pool:
        futures = [pool.submit(_compile, Trial(case, "backward", _row(case), "as it stands")) for case in cases]
        yield
    for case, future in zip(cases, futures, strict=True):
        if (error := future.result()) is not None:
            print(f"{case.name}: the Triton kernels do not run: {error[:300]}")


def tune(run: Run, cases: list[Case]) -> None:
    """Time every trial of every case, groups of equal constants together; the best of each case is printed beside the row."""
    cuda = run.device.type == "cuda"
    if not cuda:
        repair_interpreter()
    pool = _pool() if cuda else None
    for case in cases:
        if run.left() < 60 and not run.smoke:
            run.rows.add({"row": "left out", "case": case.name})
            print(f"{case.name}: not reached, the budget ended")
            continue
        mine = [t for t in trials(case, run.smoke) if (case.name, t.phase, t.change) not in run.done]
        errors = list(pool.map(_compile, mine)) if pool else [None] * len(mine)
        for phase in ("forward", "backward"):
            _time_phase(run, case, phase, [(t, e) for t, e in zip(mine, errors, strict=True) if t.phase == phase])
    if pool:
        pool.shutdown()


def _timed(run: Run, trial: Trial, sets: list[InputSet], stream: Any) -> Timing | list[str]:
    """The time of one trial, or what the gate found wrong."""
    contestant = _Triton("triton")
    with using(trial.plan), torch.cuda.stream(stream):
        if red := [line for ok, line in gate(contestant, trial.case) if not ok]:
            return red
        calls = phase_calls([bind(contestant, inputs) for inputs in sets], trial.phase)
        return by_graph(calls, stream, 0.05) if stream else by_clock(calls, run.device, 0.0, least=1)


def _time_phase(run: Run, case: Case, phase: str, mine: list[tuple[Trial, str | None]]) -> None:
    sets = [InputSet.draw(case, number) for number in range(1, 9 if case.m < 20000 else 3)]
    stream = torch.cuda.Stream() if run.device.type == "cuda" else None
    best: tuple[float, str] | None = None
    stands = ""
    for trial, error in mine:
        row = {"row": "tune", "case": case.name, "phase": phase, "change": trial.change, "plan": str(trial.plan)}
        if error is not None:
            run.rows.add(row | {"failed": error})
            continue
        try:
            timing = _timed(run, trial, sets, stream)
        except Exception as failure:  # as in _compile: the other plans still count
            run.rows.add(row | {"failed": repr(failure)[:500]})
            continue
        if isinstance(timing, list):
            run.rows.add(row | {"refused": timing})
            continue
        run.rows.add(row | timing.row() | {"tflops": case.work(phase)[0] / timing.median / 1e12})
        if trial.change == "as it stands":
            stands = f"as it stands {timing.median * 1e6:.1f} µs; "
        if best is None or timing.median < best[0]:
            best = timing.median, trial.change
    print(f"{case.name} {phase}: {stands}" + (f"best {best[0] * 1e6:.1f} µs, {best[1]}" if best else "nothing ran"), flush=True)


if __name__ == "__main__":
    sys.exit("run benchmarks/device.py --tune")
