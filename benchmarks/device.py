"""Check, then measure, every contestant of one adapted layer on this machine's GPU, inside ten minutes.

    python benchmarks/device.py --out benchmarks/results            the measurement
    python benchmarks/device.py --tune --out benchmarks/results     the alternatives of the tile table as well, and nothing else
    python benchmarks/device.py --step --out benchmarks/results     whole training steps of ViT-B/16, and nothing else
    python benchmarks/device.py --smoke --out /tmp/smoke            the same code at tiny size, on a CPU too

Order: the card's ceilings; the GPU tests; Triton's plain GEMM beside cuBLAS; then each case, the most telling first. Nothing is
timed before its outputs and gradients agree with the fp64 truth. Every row is on disk as soon as it is known; when the budget
ends, what was not reached is listed, and the same command goes on there: rows of the same commit and GPU in --out or
benchmarks/results are not measured again. Needs torch, triton and the installed package; where nothing can be fetched:

    pip install --no-index --no-deps --no-build-isolation -e .
    pip download --no-deps -d wheels open_clip_torch ftfy wcwidth peft    # elsewhere, for --step; then carry the folder here
    pip install --no-index --no-deps wheels/*.whl
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from machine import RESULTS, ROOT, Ceilings, Rows, ceilings, environment, read_rows, synchronize
from measure import by_clock, by_events, by_graph, peak_memory, saved_bytes
from ops import CONTESTANTS, Bound, Contestant, bind, gate, phase_calls
from shapes import Case, InputSet
from tables import ratio_table
from tune import compile_ahead, tune

PHASES = ("forward", "backward", "both")
SAMPLE = 0.06  # seconds given to one measurement by one method: 50 to 200 calls at these shapes


@dataclasses.dataclass
class Run:
    """One run: where it runs, where rows go, what the card can do, and when it must end."""

    device: torch.device
    rows: Rows
    ceilings: Ceilings
    deadline: float
    smoke: bool
    done: frozenset[tuple[str, ...]] = frozenset()  # what earlier runs have measured: see `finished`
    broken: bool = False  # a kernel has poisoned the CUDA context: nothing after it can be believed

    def left(self) -> float:
        """Seconds until the budget ends."""
        return self.deadline - time.monotonic()


def finished(what: str, machine: str, commit: str | None, folders: set[Path]) -> frozenset[tuple[str, ...]]:
    """What files of this kind, GPU and commit hold: (case, contestant) of ops, and the like of steps and of tuning."""
    found: set[tuple[str, ...]] = set()
    for path in [path for folder in folders for path in folder.glob(f"{what}-{machine}-*.jsonl")]:
        rows = read_rows(path)
        if not rows or commit is None or rows[0]["commit"] != commit:
            continue
        for row in rows:
            if "median_ms" not in row and not {"refused", "skipped"} & row.keys():
                continue
            if row["row"] == "tune":
                found.add((row["case"], row["phase"], row["change"]))
            elif row["row"] == "step":
                found.add((row["case"], row["contestant"], row["engine"]))
            elif row["row"] == "op" and row.get("phase", "both") == "both":
                found.add((row["case"], row["contestant"]))
            elif row["row"] == "gemm":
                found.add((row["product"], str(row["m"]), str(row["k"]), row["contestant"]))
    return frozenset(found)


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


def run_tests(run: Run, limit: float) -> bool:
    """The tests marked gpu, in their own process, stopped after `limit` seconds; False if one failed or none ran."""
    # files that need a package which is not here cannot be collected; the others must run all the same
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests", *options], cwd=ROOT, capture_output=True, text=True, timeout=limit
        )
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, output = None, (error.stdout or b"").decode(errors="replace")
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {word}", output[-400:]))) for word in ("passed", "failed"))
    seconds = round(time.monotonic() - start, 1)
    counts = {"exit": code, "passed": passed, "failed": failed, "seconds": seconds}
    run.rows.add({"row": "tests", **counts, "output": output[-8000:]})
    ending = "stopped at the limit" if code is None else f"exit {code}"
    print(f"gpu tests: {passed} passed, {failed} failed, {ending}, {seconds} s")
    if code != 0:
        print(output[-3000:])
    return failed == 0 and passed > 0


def plain_gemm(run: Run) -> None:
    """Triton's plain GEMM beside cuBLAS on the forward's and the backward's base product, every tile of its list."""
    from triton_gemm import TILES, gemm

    print("\nplain GEMM, bf16: cuBLAS TFLOP/s, Triton's best, their ratio")
    for d in (768, 1024):
        for m in (50432, 6304, 1600):
            for name, k, n in (("x Wᵀ", d, 3 * d), ("dy W", 3 * d, d)):
                sets = [
                    InputSet.draw(Case("gemm", m, k, n, dtype=torch.bfloat16, device=run.device.type), i) for i in range(1, 9)
                ]
                # dx = dy W reads W along its rows, as backward does
                pairs = [(s.x, s.layers[0].weight if name == "x Wᵀ" else s.layers[0].weight.T.contiguous().T) for s in sets]
                contestants: dict[str, Callable[..., Any]] = {"cuBLAS": lambda x, w: torch.mm(x, w.T)}
                contestants |= {f"Triton {tile}": lambda x, w, tile=tile: gemm(x, w, tile) for tile in TILES}
                truth = pairs[0][0].double() @ pairs[0][1].double().T
                speed: dict[str, float] = {}
                for label, product in contestants.items():
                    if (name, str(m), str(k), label) in run.done:
                        continue
                    error = float((product(*pairs[0]).double() - truth).abs().max() / truth.abs().max())
                    row = {"row": "gemm", "product": name, "m": m, "k": k, "n": n, "contestant": label, "error": error}
                    if not error <= 4 * torch.finfo(torch.bfloat16).eps:
                        run.rows.add(row | {"refused": "wrong result"})
                        continue
                    calls = [lambda x=x, w=w, product=product: product(x, w) for x, w in pairs]
                    timing = by_graph(calls, torch.cuda.Stream(), SAMPLE)
                    speed[label] = 2 * m * k * n / timing.median
                    run.rows.add(row | timing.row() | {"tflops": speed[label] / 1e12})
                best = max((v for label, v in speed.items() if label != "cuBLAS"), default=float("nan"))
                reference = speed.get("cuBLAS", float("nan"))
                print(f"  {name}  {m:6d}x{k}->{n:5d}  {reference / 1e12:6.0f}  {best / 1e12:6.0f}  {best / reference:.2f}")


def _methods(run: Run, bounds: list[Bound], phase: str, stream: Any) -> list[Any]:
    calls = phase_calls(bounds, phase)
    if run.device.type != "cuda":
        return [by_clock(calls, run.device, 0.01, least=3)]
    return [by_events(calls, SAMPLE), by_graph(calls, stream, SAMPLE)]


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
            for timing in _methods(run, bounds, phase, stream):
                speeds = {"tflops": flops / timing.median / 1e12, "gbps": nbytes / timing.median / 1e9}
                share = run.ceilings.seconds(flops, nbytes) / timing.median
                run.rows.add(row | {"phase": phase} | timing.row() | speeds | {"share_of_roofline": share})


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
            run.rows.add({"row": "op", "case": case.name, "contestant": contestant.name, "failed": repr(error)[:2000]})
            print(f"  {contestant.name}: failed, {repr(error)[:300]}")
            if run.device.type == "cuda" and "CUDA error" in repr(error):
                run.broken = True
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


def main(arguments: list[str] | None = None) -> int:
    """Run; 0 if everything that was reached is right, 1 if a test or a gate was red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the raw rows")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--tune", action="store_true", help="time the alternatives of the tile table, nothing else")
    parser.add_argument("--step", action="store_true", help="time whole training steps, nothing else; needs open_clip")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests marked gpu")
    parser.add_argument("--without", help="leave out contestants whose name holds this text")
    parser.add_argument("--only", default="", help="only contestants whose name holds this text (and the frozen floor)")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if not options.smoke and not torch.cuda.is_available():
        print("no CUDA device: benchmarks/device.py measures a GPU; --smoke runs its code on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if options.smoke else torch.bfloat16
    ceiling = ceilings(device, dtype, 0.01 if options.smoke else 2.0, size=128 if options.smoke else None)
    header = environment(device)
    stamp = header["date"].replace(":", "").replace("-", "")[:15]
    machine = str(header.get("gpu", "cpu")).replace(" ", "-").lower()
    what = "tune" if options.tune else "step" if options.step else "device"
    done = finished(what, machine, header["commit"], {options.out, RESULTS})
    rows = Rows(options.out / f"{what}-{machine}-{stamp}.jsonl", header | {"ceilings": dataclasses.asdict(ceiling)})
    run = Run(device, rows, ceiling, deadline, options.smoke, done)
    print(f"{machine}: {ceiling.flops / 1e12:.1f} TFLOP/s in {ceiling.dtype}, copy {ceiling.bandwidth / 1e9:.0f} GB/s")

    if options.tune:
        tune(run, cases(options.smoke, device.type)[: 1 if options.smoke else None])
        print(f"\nraw rows: {rows.path}")
        return 0
    if options.step:
        from device_steps import measure_steps  # open_clip is needed here only

        measure_steps(run)
        print(f"\nraw rows: {rows.path}")
        return 0
    green = True
    if device.type == "cuda" and not options.smoke:
        with compile_ahead(cases(False, "cuda")):
            # at most a third of the time, so that the measurement fits
            green = options.no_tests or run_tests(run, options.budget / 3)
        plain_gemm(run)
    contestants = [c for c in CONTESTANTS if c.name == "frozen" or options.only in c.name]
    contestants = [c for c in contestants if options.without is None or options.without not in c.name]
    left_out: list[str] = []
    for case in cases(options.smoke, device.type):
        # a case with its compilations takes about half a minute; leave time for the table
        if run.broken or (run.left() < 25 and not options.smoke):
            left_out.append(case.name)
            continue
        measure_case(run, case, contestants)
    if left_out:
        rows.add({"row": "left out", "cases": left_out})
        print(
            "not measured, the CUDA context broke:" if run.broken else "not measured, the budget ended:", *left_out, sep="\n  "
        )
    written = read_rows(rows.path)
    print(ratio_table(written))
    print(measured_points(written, machine))
    print(f"\nraw rows: {rows.path}")
    return 0 if green and not any("refused" in r or "failed" in r for r in written) else 1


if __name__ == "__main__":
    raise SystemExit(main())
