"""`benchmarks/device.py --tune`: the tile table's alternatives, each checked by the gate, then timed, one change at a time.

Compiling dominates (a second or two a kernel, hundreds of kernels), so all cores compile ahead of the timing, in processes
that record the very call and start no kernel: one that is wrong cannot hurt the others. The cubins come back through Triton's
cache on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.pool import Pool
from typing import Any

import torch

from fastlora.testing import repair_interpreter
from measure import Timing, by_clock, by_graph
from ops import FastLoRA, bind, gate, phase_calls
from run import Run
from shapes import Case, InputSet

PATIENCE = 120.0  # seconds to wait for one compilation: beyond, its process has died or its tile is not worth having

# (m, n, k, warps, stages): of the forward's x Wᵀ, then of the backward's dy W, where n is the step over N
FORWARD: tuple[tuple[int, ...], ...] = (
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4),
    (128, 256, 128, 8, 2), (128, 128, 128, 8, 3), (64, 256, 128, 8, 2), (64, 128, 128, 4, 3),
)  # fmt: skip
BACKWARD: tuple[tuple[int, ...], ...] = (
    (128, 64, 128, 8, 3), (128, 32, 128, 8, 4), (128, 128, 128, 8, 2),
    (64, 64, 256, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 8, 3), (128, 64, 256, 8, 3), (128, 64, 256, 8, 2),
)  # fmt: skip
SMOKE: tuple[tuple[int, ...], ...] = ((32, 16, 128, 4, 1),)
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
    """Compile every kernel of the trial's direction; the text of what went wrong, a race for instance, or None."""
    from fastlora.kernels.launch import recording
    from fastlora.kernels.races import races

    try:
        with using(trial.plan), recording() as launches:
            bound = bind(_Triton("triton"), InputSet.draw(trial.case, 1))
            bound.both() if trial.phase == "backward" else bound.forward()
        found = [race for one in launches for race in races(one.compile().asm["ttgir"])]
        return f"race: {found[0]}" if found else None
    except Exception as error:  # a tile that Triton refuses is a result, not a failure of the run
        return f"{type(error).__name__}: {str(error)[-500:]}"  # the reason stands after the source


def _pool() -> Pool:
    return multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2))


@contextlib.contextmanager
def compile_ahead(run: Run, cases: list[Case]) -> Iterator[None]:
    """Fill Triton's cache with the kernels of these cases while the body runs, and wait for the last one."""
    with _pool() as pool:
        answers = [pool.apply_async(_compile, (Trial(case, "backward", _row(case), "as it stands"),)) for case in cases]
        yield
        for case, answer in zip(cases, answers, strict=True):
            if (error := _answer(run, answer)) is not None:
                print(f"{case.name}: the Triton kernels do not compile: {error}", flush=True)


def _answer(run: Run, answer: Any) -> str | None:
    try:
        return answer.get(timeout=max(1.0, min(PATIENCE, run.left() - 10)))
    except multiprocessing.TimeoutError:
        return "not compiled in time"


def tune(run: Run, cases: list[Case]) -> None:
    """Time every trial of every case; the best of each is printed beside the row."""
    todo = [t for case in cases for t in trials(case, run.smoke) if (case.name, t.phase, t.change) not in run.done]
    if run.device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
        repair_interpreter()
        _tune(run, cases, dict.fromkeys(todo))
        return
    with _pool() as pool:  # what it is still at when the budget ends is dropped
        _tune(run, cases, {trial: pool.apply_async(_compile, (trial,)) for trial in todo})


def _tune(run: Run, cases: list[Case], todo: dict[Trial, Any]) -> None:
    for case in cases:
        for phase in ("forward", "backward"):
            mine = {trial: answer for trial, answer in todo.items() if (trial.case, trial.phase) == (case, phase)}
            if run.over(30) and mine:
                run.rows.add({"row": "left out", "case": case.name, "phase": phase})
                print(f"{case.name} {phase}: not reached", flush=True)
            elif mine:
                _time_phase(run, case, phase, mine)


def _timed(run: Run, trial: Trial, sets: list[InputSet], stream: Any) -> Timing | list[str]:
    """The time of one trial, or what the gate found wrong."""
    contestant = _Triton("triton")
    with using(trial.plan), torch.cuda.stream(stream):
        if red := [line for ok, line in gate(contestant, trial.case) if not ok]:
            return red
        calls = phase_calls([bind(contestant, inputs) for inputs in sets], trial.phase)
        return by_graph(calls, stream, 0.05) if stream else by_clock(calls, run.device, 0.0, least=1)


def _time_phase(run: Run, case: Case, phase: str, mine: dict[Trial, Any]) -> None:
    sets = [InputSet.draw(case, number) for number in range(1, 9 if case.m < 20000 else 3)]
    stream = torch.cuda.Stream() if run.device.type == "cuda" else None
    best: tuple[float, str] | None = None
    stands = ""
    for trial, answer in mine.items():
        row = {"row": "tune", "case": case.name, "phase": phase, "change": trial.change, "plan": str(trial.plan)}
        if run.over(10):
            break
        if answer is not None and (error := _answer(run, answer)) is not None:
            run.rows.add(row | {"failed": error})
            continue
        try:
            timing = _timed(run, trial, sets, stream)
        except Exception as failure:  # as in _compile: the other plans still count
            run.failed(row, failure)
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
