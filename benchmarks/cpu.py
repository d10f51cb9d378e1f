"""Every CPU figure of README and docs/performance.md, by one command on a quiet machine:

    OMP_NUM_THREADS=2 python benchmarks/cpu.py

Three whole runs, about forty minutes on two cores; each is cut into parts, each part a process and a file of rows under
benchmarks/results/cpu/. A part that is there is not done again, so a run that was stopped goes on; --fresh first removes them
all (a fresh run that was stopped goes on without it). Tables and pictures follow from the rows:

    python benchmarks/pages.py

What takes no time (--only 'gate|memory|counted') may run on a busy machine before. --tiny proves that all of it runs, in a
minute; nothing of it belongs in the repository.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import allocator
from baselines import TRAINEES, Job
from fastlora.bench.rows import MODEL
from machine import Ceilings, ceilings, environment
from memory import counts, measure, ready
from ops import CONTESTANTS
from ops import gate as op_gate
from ops_timing import op_rows
from rows import RESULTS, ROOT, Rows, read_rows
from savings import savings
from shapes import Case
from steps import checked, in_turn, seconds_whole, side_by_side

Row = dict[str, Any]
OURS = ["fastlora", "fastlora, share_prefix", "fastlora, host's encoders"]
EVERYONE = ["frozen", *OURS, "cuBLAS beta=1", "textbook", "the paper's arithmetic", "PEFT", "full fine-tuning"]
PATCH_ALONE = "fastlora, host's encoders"
MAIN = [name for name in EVERYONE if name != PATCH_ALONE]
AGAIN = [*OURS[:2], "the paper's arithmetic"]
RUNS = 3
ROUNDS, ROUNDS_SMALL = 2, 5  # timed steps of each contestant in a run, after the warm-up; steps of the mini CLIP are noisier


@dataclasses.dataclass(frozen=True)
class Context:
    """What a part is given: the run's number, this process's ceilings, whether sizes are tiny, where the gate's rows lie.

    wide: how many runs have every contestant, the later ones those that targets speak of.
    """

    run: int
    wide: int
    limits: Ceilings
    tiny: bool
    gates: Path


def here(names: list[str]) -> list[str]:
    """Those that can run."""
    return [name for name in names if TRAINEES[name].missing() is None]


def gates(context: Context) -> list[Row]:
    """What every step part asks for: each contestant's outputs and gradients are right, and it drops out."""
    rows = []
    for model in ("mini",) if context.tiny else ("mini", MODEL):
        for name in here(EVERYONE if not context.tiny else ["frozen", "fastlora", "PEFT"]):
            try:
                checked(name, Job(model))
                row: Row = {"ok": True}
            except AssertionError as error:
                row = {"ok": False, "why": str(error)}
            print(f"{model}: {name} {row}", flush=True)
            rows.append({"row": "gate", "model": model, "contestant": name} | row)
    return rows


def steps(job: Job, names: list[str], again: list[str], count: list[str]) -> Callable[[Context], list[Row]]:
    """A part: whole training steps of one job; the first run (--wide: runs) has all `names`, the next ones those of `again`."""

    def part(context: Context) -> list[Row]:
        mine = dataclasses.replace(job, model="mini", batch=2, classes=min(job.classes, 3)) if context.tiny else job
        passed = {
            r["contestant"] for r in read_rows(context.gates) if r["row"] == "gate" and r["model"] == mine.model and r["ok"]
        }
        wanted = [name for name in here(names if context.run <= context.wide else again) if name in passed]
        counted = count if context.run == 1 else []  # counts are the same in every run
        rounds = 1 if context.tiny else ROUNDS if job.model == MODEL else ROUNDS_SMALL
        return side_by_side(mine, wanted, rounds, context.limits, counted, gated=True)

    return part


def memory(context: Context) -> list[Row]:
    """Peak memory in fresh processes: all at 100 classes; ours and the paper's at fewer, so that both can be fitted."""
    base = Job("mini" if context.tiny else MODEL, batch=2 if context.tiny else 32)
    plan = [(10, ["fastlora", "the paper's arithmetic"]), (50, ["the paper's arithmetic"]), (100, MAIN), (1000, OURS[:2])]
    rows = []
    for classes, names in plan[: 1 if context.tiny else None]:
        job = dataclasses.replace(base, classes=classes)
        for name in here(names)[: 1 if context.tiny else None]:
            if found := measure(name, job):
                rows.append({"row": "memory", **job.row(), "contestant": name, **found})
                print(f"{job.name}: {name} {found}", flush=True)
    return rows


def ops(context: Context) -> list[Row]:
    """One adapted layer: packed q, k, v, a linear, an MLP."""
    m, d = (24, 32) if context.tiny else (1600, 768)
    cases = [Case("qkv", m, d, 3 * d, 3, rank, p) for rank in (2, 16) for p in (0.0, 0.25)]
    cases += [Case("linear", m, d, d, 1, 16, 0.25), Case("mlp", m, d, 4 * d, 1, 16, 0.25)]
    rows: list[Row] = []
    for case in cases:
        right = []
        for contestant in (c for c in CONTESTANTS if c.missing(case) is None):
            red = [line for ok, line in op_gate(contestant, case) if not ok]
            right += [] if red else [contestant]
            if red:
                print(f"{case.name}: {contestant.name} is not timed: {red}", flush=True)
                rows.append({"row": "op", "case": case.name, "contestant": contestant.name, "refused": red})
        rows += op_rows(case, right, 1 if context.tiny else 5, context.limits)
    return rows


SCALES: dict[str, list[Job]] = {
    "classes": [Job("mini", classes=n) for n in (10, 30, 100, 300, 1000)],
    "batch": [Job("mini", classes=10, batch=n) for n in (8, 32, 128)],
    "rank": [Job("mini", classes=10, rank=n) for n in (2, 8, 32, 64)],
    "depth": [Job("mini", classes=10, depth=n) for n in (2, 4, 8, 12)],
    "width": [Job("mini", classes=10, width=n) for n in (64, 128, 256, 512)],
}


def scaling(axis: str) -> Callable[[Context], list[Row]]:
    """A part: the cost of a step as one size grows."""

    def part(context: Context) -> list[Row]:
        jobs = SCALES[axis][: 2 if context.tiny else None]
        names = ["frozen", "fastlora", "textbook", "the paper's arithmetic"][: 2 if context.tiny else None]
        rows = []
        for job in jobs:
            mine = dataclasses.replace(job, batch=2) if context.tiny and axis != "batch" else job
            found = side_by_side(mine, names, 1 if context.tiny else ROUNDS, context.limits, gated=context.tiny)
            rows += [row | {"row": "scaling", "axis": axis, "size": getattr(job, axis)} for row in found]
        return rows

    return part


def apart(context: Context) -> list[Row]:
    """A step with one saving taken away, for each of them."""
    job = Job("mini", batch=2, classes=3) if context.tiny else Job(MODEL, classes=100)
    return savings(job, 1 if context.tiny else ROUNDS)


def kept_memory(context: Context) -> list[Row]:
    """fastlora with and without kept memory, and the paper's arithmetic without it, as its users run it."""
    job = Job("mini", batch=2, classes=3) if context.tiny else Job(MODEL, classes=100)
    return allocator.measure(job, 1 if context.tiny else ROUNDS)


def agreement(context: Context) -> list[Row]:
    """The harness's PEFT and textbook beside plain.py's, a process of its own."""
    job = Job("mini", batch=2, classes=3) if context.tiny else Job(MODEL, classes=10)

    def plain() -> list[Row]:
        command = [sys.executable, str(ROOT / "benchmarks" / "plain.py"), "--classes", str(job.classes), "--steps", str(ROUNDS)]
        command += ["--tiny"] if context.tiny else []
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
        assert done.returncode == 0, f"benchmarks/plain.py failed:\n{done.stderr[-2000:]}"
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    outside = plain()
    names = ("PEFT", "textbook")
    # both in turn and without kept memory, as plain.py does
    taken = in_turn({name: partial(seconds_whole, ready(TRAINEES[name], job)) for name in names}, ROUNDS, job.name)
    inside = [{"contestant": name, "seconds": t} for name in names for t in taken[name].seconds]
    common = {"row": "agreement", **job.row()}
    return [common | {"where": where} | row for where, rows in (("inside", inside), ("outside", outside)) for row in rows]


def counted(context: Context) -> list[Row]:
    """What is the same on every machine: FLOPs of a patched model over the frozen one; bytes one packed q, k, v saves."""
    import fastlora
    from measure import saved_bytes

    job = Job("mini" if context.tiny else MODEL, batch=2, classes=4, rank=16)
    flops = {name: counts(ready(TRAINEES[name], job))["flops"] for name in ("frozen", "fastlora, host's encoders")}
    rows: list[Row] = [{"row": "counted", **job.row(), "contestant": name, "flops": n} for name, n in flops.items()]
    m, d, rank = 1600, 768, 16
    x, w, bias = torch.randn(m, d, requires_grad=True), torch.randn(3 * d, d), torch.randn(3 * d)
    a, b = torch.randn(3, rank, d, requires_grad=True), torch.randn(3 * d, rank, requires_grad=True)
    saved = saved_bytes(lambda: fastlora.lora_linear(x, w, bias, a, b, scale=1.0, dropout=0.25), [w, bias, a, b])
    return [*rows, {"row": "counted", "case": f"qkv {m}x{d}->{3 * d} r={rank} p=0.25", "saved_over_x": saved / x.nbytes}]


# name -> (what it does, whether every run repeats it)
PARTS: dict[str, tuple[Callable[[Context], list[Row]], bool]] = {
    "gate": (gates, False),
    "step-vit-b-32-100": (steps(Job(MODEL, classes=100), MAIN, AGAIN, OURS[:2]), True),
    "step-vit-b-32-1000": (steps(Job(MODEL, classes=1000), MAIN, AGAIN, OURS[:2]), True),
    "step-vit-b-32-10": (steps(Job(MODEL, classes=10), EVERYONE, AGAIN, EVERYONE), True),
    "step-mini-10": (steps(Job("mini", classes=10), EVERYONE, EVERYONE, EVERYONE), True),
    "step-mini-100": (steps(Job("mini", classes=100), EVERYONE, EVERYONE, EVERYONE), True),
    "savings": (apart, False),
    "allocator": (kept_memory, False),
    "agreement": (agreement, False),
    "ops": (ops, False),
    "memory": (memory, False),
    "counted": (counted, False),
    **{f"scaling-{axis}": (scaling(axis), False) for axis in SCALES},
}


# What takes no time: its rows are right on a busy machine too, and carry no ceilings.
UNTIMED = ("gate", "memory", "counted")


def do_part(name: str, run: int, wide: int, out: Path, tiny: bool) -> None:
    """Measure one part in this process; its file appears when it is complete."""
    device = torch.device("cpu")
    limits = ceilings(device, torch.float32, 0.01 if tiny else 1.0, size=128 if tiny else None)
    path = out / f"run{run}-{name}.jsonl"
    begun = time.monotonic()
    found = PARTS[name][0](Context(run, wide, limits, tiny, out / "run1-gate.jsonl"))
    rows = Rows(path.with_suffix(".partial"), environment(device) | {"part": name, "run": run, "seed": 0})
    if name not in UNTIMED:
        rows.add({"row": "ceilings", **dataclasses.asdict(limits)})
    for row in found:
        rows.add(row | {"run": run})
    rows.add({"row": "end", "seconds": round(time.monotonic() - begun, 1)})
    rows.path.rename(path)


def main(arguments: list[str] | None = None) -> int:
    """All parts of all runs that are not there yet; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu", help="folder for the raw rows")
    parser.add_argument("--runs", type=int, default=RUNS, help="whole runs")
    parser.add_argument("--wide", type=int, default=1, help="whole runs with every contestant on the ViT-B-32")
    parser.add_argument("--only", default="", help="only parts whose name this regular expression is found in")
    parser.add_argument("--fresh", action="store_true", help="remove the rows that are there, then measure; go on without it")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove nothing but that it runs")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part:
        do_part(options.part, options.run, options.wide, options.out, options.tiny)
        return 0
    plan = [(run, name) for run in range(1, options.runs + 1) for name, (_, again) in PARTS.items() if again or run == 1]
    plan = [(run, name) for run, name in plan if re.search(options.only, name)]
    paths = {part: options.out / f"run{part[0]}-{part[1]}.jsonl" for part in plan}
    if options.fresh:  # all of them now, so that a run that was stopped goes on without --fresh
        for path in paths.values():
            path.unlink(missing_ok=True)
    failed = []
    for run, name in plan:
        if paths[run, name].exists():
            continue
        print(f"\nrun {run}, {name}", flush=True)
        if options.tiny:
            do_part(name, run, options.wide, options.out, True)
            continue
        # a process each, so that no part is timed in the memory that another left behind
        command = [sys.executable, str(Path(__file__)), "--part", name, "--run", str(run)]
        command += ["--wide", str(options.wide), "--out", str(options.out)]
        if subprocess.run(command, env=os.environ | {"PYTHONWARNINGS": "ignore"}).returncode:
            failed.append(f"run {run}, {name}")
    print(f"\nfailed: {', '.join(failed)}" if failed else f"\nall rows are in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
