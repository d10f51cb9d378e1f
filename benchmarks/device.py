"""Check, then measure, every contestant of one adapted layer on this machine's GPU, inside ten minutes.

    python benchmarks/device.py --out DIR            the tests marked gpu that are quick, then the measurement of one layer
    python benchmarks/device.py --step --out DIR     whole training steps of ViT-B/16, and nothing else
    python benchmarks/device.py --tune --out DIR     the alternatives of the tile table, and nothing else
    python benchmarks/device.py --tests --out DIR    all tests marked gpu, compute-sanitizer and the soak too, and nothing else
    python benchmarks/device.py --smoke --out DIR    the same code at tiny size, on a CPU too; also with --step and --tune

Order: the card's ceilings; the GPU tests; Triton's plain GEMM beside cuBLAS; then each case, the most telling first. Nothing is
timed before its outputs and gradients agree with the fp64 truth. Every row is on disk as soon as it is known; when the budget
ends, what was not reached is listed, and the same command goes on there: rows of the same commit and GPU in --out or
benchmarks/results are not measured again. A kernel that poisons the CUDA context costs its own row: the script starts itself
anew and goes on behind it. In a copy without .git name the commit: --commit. CONTRIBUTING.md says what must be installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from device_tests import run_tests
from machine import RESULTS, Rows, ceilings, environment, read_rows, synchronize
from measure import Timing, by_clock, by_events, by_graph, peak_memory, saved_bytes
from ops import CONTESTANTS, Bound, Contestant, bind, gate, phase_calls
from run import Run, finished
from shapes import Case, InputSet
from tables import ratio_table
from tune import compile_ahead, tune

PHASES = ("forward", "backward", "both")
SAMPLE = 0.06  # seconds given to one measurement by one method: 50 to 200 calls at these shapes


def cases(smoke: bool, device: str) -> list[Case]:
    """Packed q, k, v of ViT-B (768) and ViT-L (1024) at three numbers of tokens; those with a target come first."""
    if smoke:
        return [
            Case("qkv", 20, 32, 96, 3, 2, 0.0, torch.float32, device),
            Case("qkv", 20, 32, 96, 3, 16, 0.25, torch.float32, device),
        ]
    return [
        Case("qkv", m, d, 3 * d, 3, rank, p, torch.bfloat16, device)
        for rank in (16, 2)
        for d in (768, 1024)
        for m in (50432, 6304, 1600)
        for p in (0.25, 0.0)
    ]


def input_sets(case: Case, device: torch.device) -> list[InputSet]:
    """As many sets as together are three times the L2, so that none is still there when its turn comes again."""
    first = InputSet.draw(case, 1)
    if device.type != "cuda":
        return [first, InputSet.draw(case, 2)]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, min(12, math.ceil(3 * cache / first.nbytes())))
    return [first, *(InputSet.draw(case, number) for number in range(2, count + 1))]


def _methods(run: Run, bounds: list[Bound], phase: str, stream: Any, row: dict[str, Any]) -> Iterator[Timing]:
    calls = phase_calls(bounds, phase)
    if run.device.type != "cuda":
        yield by_clock(calls, run.device, 0.01, least=3)
        return
    yield by_events(calls, SAMPLE)
    try:
        yield by_graph(calls, stream, SAMPLE)
    except Exception as error:  # what cannot be captured still has its time by events, and its other phases
        print(f"  {row['contestant']} {phase}: no graph, {repr(error)[:200]}", flush=True)
        run.failed(row | {"phase": phase, "method": "graph"}, error)


def measure_contestant(run: Run, case: Case, contestant: Contestant, sets: list[InputSet]) -> None:
    """The gate, then every phase; rows say what came of it, refused and failed ones too."""
    row: dict[str, Any] = {"row": "op", "case": case.name, "contestant": contestant.name}
    row |= {"kind": case.kind, "m": case.m, "k": case.k, "n": case.n, "groups": case.groups, "rank": case.rank}
    row |= {"dropout": case.dropout, "dtype": str(case.dtype).removeprefix("torch."), "sets": len(sets)}
    if (reason := contestant.missing(case)) is not None:
        run.rows.add(row | {"skipped": reason})
        return
    red = [line for ok, line in gate(contestant, case) if not ok]
    if red:
        run.rows.add(row | {"refused": red})
        print(f"  {contestant.name}: refused, {red[0]}")
        return
    stream = torch.cuda.Stream() if run.device.type == "cuda" else None
    synchronize(run.device)
    with torch.cuda.stream(stream):
        bounds = [bind(contestant, inputs) for inputs in sets]
        weights = [t for layer in sets[0].layers for t in vars(layer).values()]
        row["saved_bytes"] = saved_bytes(bounds[0].forward, weights)
        with peak_memory(run.device) as peak:
            bounds[0].both()
        row |= peak
        for phase in PHASES:
            flops, nbytes = case.work(phase)
            for timing in _methods(run, bounds, phase, stream, row):
                speeds = {"tflops": flops / timing.median / 1e12, "gbps": nbytes / timing.median / 1e9}
                share = run.ceilings.seconds(flops, nbytes) / timing.median
                run.rows.add(row | {"phase": phase} | timing.row() | speeds | {"share_of_roofline": share})
            if run.broken:
                return


def measure_case(run: Run, case: Case, contestants: list[Contestant]) -> None:
    """All contestants of one case, on the same input sets."""
    print(f"{case.name}  ({run.left():.0f} s left)", flush=True)
    sets = input_sets(case, run.device)
    for contestant in contestants:
        if (case.name, contestant.name) in run.done:
            continue
        # Inductor needs about ten seconds a case: the cases that have a target only
        if "compile" in contestant.name and not run.smoke and (case.k, case.rank) != (768, 16):
            continue
        try:
            measure_contestant(run, case, contestant, sets)
        except Exception as error:  # one contestant's failure must not cost the others' numbers; the row keeps it
            print(f"  {contestant.name}: failed, {repr(error)[:300]}", flush=True)
            run.failed({"row": "op", "case": case.name, "contestant": contestant.name}, error)
        if run.over(10):
            return


def measured_points(rows: list[dict[str, Any]], machine: str) -> str:
    """The times of both backends at K = 768, as kernels/tiles.py holds them: each line belongs to the row of its class."""
    times: dict[tuple[int, int, float], dict[str, float]] = {}
    for row in rows:
        if row["row"] == "op" and row.get("phase") == "both" and row.get("method") == "graph" and row["k"] == 768:
            times.setdefault((row["rank"], row["m"], row["dropout"]), {})[row["contestant"]] = row["median_ms"] * 1e3
    lines = [
        f"  rank {rank}, dropout {p:g}: Measured({machine!r}, {m}, {us['fastlora triton']:.1f}, {us['fastlora eager']:.1f})"
        for (rank, m, p), us in sorted(times.items())
        if {"fastlora triton", "fastlora eager"} <= us.keys()
    ]
    return "\n".join(["", "for kernels/tiles.py:", *lines]) if lines else ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the raw rows")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    only = parser.add_mutually_exclusive_group()
    for name, what in (
        ("step", "time whole training steps, nothing else; needs open_clip"),
        ("tune", "time the alternatives of the tile table, nothing else"),
        ("tests", "run all tests marked gpu, nothing else"),
    ):
        only.add_argument(f"--{name}", dest="what", action="store_const", const=name, default="device", help=what)
    parser.add_argument("--commit", help="what this tree is a copy of, where it has no .git")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests marked gpu")
    parser.add_argument("--without", help="leave out contestants whose name holds this text")
    parser.add_argument("--only", default="", help="only contestants whose name holds this text (and the frozen floor)")
    return parser.parse_args(arguments)


def measure_layers(run: Run, options: argparse.Namespace) -> bool:
    """The quick tests, the plain products, then every case; False where a test was red."""
    green = True
    if run.device.type == "cuda" and not run.smoke:
        with compile_ahead(run, cases(False, "cuda")):
            # at most a third of the time, so that the measurement fits
            green = options.no_tests or run_tests(run, options.budget / 3, "gpu and not slow")
        from triton_gemm import measure_products  # needs Triton, which a CPU's smoke run may lack

        measure_products(run, SAMPLE)
    contestants = [c for c in CONTESTANTS if c.name == "frozen" or options.only in c.name]
    contestants = [c for c in contestants if options.without is None or options.without not in c.name]
    left_out: list[str] = []
    for case in cases(run.smoke, run.device.type):
        # a case with its compilations takes about half a minute; leave time for the table
        if run.over(25):
            left_out.append(case.name)
            continue
        measure_case(run, case, contestants)
    if left_out and not run.broken:
        run.rows.add({"row": "left out", "cases": left_out})
        print("not measured, the budget ended:", *left_out, sep="\n  ")
    return green


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 if everything that was reached is right, 1 if a test or a gate was red, 2 without a GPU."""
    options = parse(arguments)
    deadline = time.monotonic() + options.budget
    if not options.smoke and not torch.cuda.is_available():
        print("no CUDA device: benchmarks/device.py measures a GPU; --smoke runs its code on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    ceiling = ceilings(device, dtype, 0.01 if options.smoke else 2.0, size=128 if options.smoke else None)
    header = environment(device, options.commit)
    stamp = header["date"].replace(":", "").replace("-", "")[:15]
    machine = str(header.get("gpu", "cpu")).replace(" ", "-").lower()
    done = finished(options.what, machine, header["commit"], {options.out, RESULTS})
    rows = Rows(options.out / f"{options.what}-{machine}-{stamp}.jsonl", header | {"ceilings": dataclasses.asdict(ceiling)})
    run = Run(device, rows, ceiling, deadline, options.smoke, done)
    speeds = f"{ceiling.flops / 1e12:.1f} TFLOP/s in {ceiling.dtype}, copy {ceiling.bandwidth / 1e9:.0f} GB/s"
    print(f"{machine}: {speeds}", flush=True)

    green = True
    if options.what == "tune":
        tune(run, cases(options.smoke, device.type)[: 1 if options.smoke else None])
    elif options.what == "step":
        from device_steps import measure_steps  # open_clip is needed here only

        measure_steps(run, options.only, options.without)
    elif options.what == "tests":
        green = run_tests(run, options.budget - 30, "gpu")
    else:
        green = measure_layers(run, options)
    written = read_rows(rows.path)
    if options.what == "device":
        print(ratio_table(written))
        print(measured_points(written, machine))
    print(f"\nraw rows: {rows.path}", flush=True)
    if run.broken and header["commit"] and run.left() > 60:
        print("the CUDA context was lost: once more, behind what lost it", flush=True)
        # the last of two equal options counts
        again = [*(sys.argv[1:] if arguments is None else arguments), "--no-tests", "--budget", f"{run.left() - 10:.0f}"]
        os.execv(sys.executable, [sys.executable, __file__, *again])
    return 0 if green and not any("refused" in r or "failed" in r for r in written) else 1


if __name__ == "__main__":
    raise SystemExit(main())
