"""Part d: alternatives of the tile table, one change at a time, each checked by the gate and then timed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch

from fastlora.kernels import tiles
from measure import by_clock, by_graph
from ops import FastLoRA, bind, gate, phase_calls
from shapes import Case

from .ahead import needed
from .items import Item, Row, at
from .layers import config, input_sets
from .run import Run

__all__ = ["items"]

SAMPLE = 0.05
# Seconds of a trial beside its sample, at 50432 rows and at fewer: its gate, and the capture of a graph.
SETUP = {"large": 0.35, "small": 0.15}
CALLS = 120

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
    plan: tiles.Plan
    change: str


def cases(device: str, smoke: bool) -> list[Case]:
    """Packed q, k, v of width 768 at rank 16, which rank 2 is padded to."""
    if smoke:
        return [Case("qkv", 20, 32, 96, 3, 16, 0.25, torch.float16, device)]
    return [Case("qkv", m, 768, 2304, 3, 16, p, torch.bfloat16, device) for m in (50432, 6304) for p in (0.25, 0.0)]


def trials(case: Case, arch: int, smoke: bool) -> list[Trial]:
    """The row as it stands, then each alternative: forms crossed with the tiles of the big product."""
    precision = tiles.precision_of(case.dtype)
    base = tiles.choose(tiles.Call(arch, precision, tiles.padded_rank(case.rank), case.dropout > 0))
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


def _changed(
    case: Case, base: tiles.Plan, phase: str, kernel: str, shape: tuple[int, ...], form: dict[str, bool]
) -> list[Trial]:
    """The trial of one kernel's tile in one form, if that is a change."""
    sizes = dict(zip(("m", "n", "k", "warps", "stages"), shape, strict=True))
    tile = dataclasses.replace(getattr(base, kernel), **sizes)
    plan = dataclasses.replace(base, **{kernel: tile}, **form)
    what = f"{kernel} {tile}, " + ", ".join(f"{name}={value}" for name, value in form.items())
    return [] if plan == base else [Trial(case, phase, plan, what)]


def items(arch: int, device: str, smoke: bool) -> list[Item]:
    """An item for every trial of every case."""
    found = []
    for case in cases(device, smoke):
        setup = at(case.m, SETUP)
        for trial in trials(case, arch, smoke):
            found.append(
                Item(
                    "d",
                    f"{case.name} {trial.phase}: {trial.change}",
                    setup + SAMPLE,
                    functools.partial(measure, trial),
                    needs=(needed(config(case, arch), trial.plan, trial.phase),),
                    calls=CALLS,
                    strict=True,
                    about={"case": case.name, "contestant": "fastlora triton", "phase": trial.phase, "change": trial.change},
                )
            )
    return found


@contextlib.contextmanager
def using(plan: tiles.Plan) -> Iterator[None]:
    """Every call takes this plan instead of the table's row."""
    before, tiles.choose = tiles.choose, lambda call: plan
    try:
        yield
    finally:
        tiles.choose = before


class _Triton(FastLoRA):
    """The Triton backend, in its interpreter too: a smoke run proves that this part runs."""

    def missing(self, case: Case) -> None:
        return None


def measure(trial: Trial, run: Run) -> Iterator[Row]:
    """The time of one trial that is right."""
    contestant = _Triton("triton")
    row: Row = {"row": "tune", "plan": str(trial.plan)}
    stream = torch.cuda.Stream() if run.device.type == "cuda" else None
    if stream is not None:
        torch.cuda.synchronize()
    with using(trial.plan), torch.cuda.stream(stream):
        if red := [line for ok, line in gate(contestant, trial.case) if not ok]:
            yield row | {"refused": red}
            return
        sets = run.keep(trial.case, functools.partial(input_sets, trial.case, run.device))
        calls = phase_calls([bind(contestant, inputs) for inputs in sets], trial.phase)
        timing = by_graph(calls, stream, SAMPLE) if stream else by_clock(calls, run.device, 0.0, least=1)
        yield row | timing.row() | {"tflops": trial.case.work(trial.phase)[0] / timing.median / 1e12}
