"""Fourteen minutes of a GPU: are the kernels right, and how fast are they?

    python benchmarks/device.py --canary --out DIR   part a, at most 150 s
    python benchmarks/device.py --rest --out DIR     the other parts, by worth
    python benchmarks/device.py --out DIR            both, if all is green
    python benchmarks/device.py --plan               what each part takes
    python benchmarks/device.py --smoke --out DIR    tiny sizes, on a CPU too

Each row is on disk as soon as it is known, and what was not reached is listed.
A second call goes on where the first one stopped, or was killed: what rows in
--out or in benchmarks/results/gpu settle, of the same GPU and the same source,
is not measured again. An item that hangs, or takes its process or the CUDA
context with it, costs its own row only.

Exit status: 0 all that was reached is right; 1 something is wrong; 2 it cannot
run here; 3 the canary was not finished.
"""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.history import History, tree
from gpu.items import CANARY, PARTS
from gpu.supervise import LOST, Watch, supervise
from rows import ON_GPUS, Rows

MINUTES = {"canary": 2.5, "rest": 9.5}  # a command is given ten minutes there
KILLED = -signal.SIGKILL  # by the process that watches it: the time is up, or it hangs
RIGHT, WRONG, CANNOT, UNFINISHED = 0, 1, 2, 3


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parts = "\n".join(["parts:", *(f"  {part}  {title}" for part, title in PARTS.items())])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=parts, formatter_class=raw)
    parser.add_argument("--out", type=Path, help="folder for the raw rows (default: benchmarks/results/gpu)")
    parser.add_argument("--minutes", type=float, help="in all (default: 2.5 for the canary and 9.5 for the rest)")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--canary", action="store_true", help="part a alone")
    half.add_argument("--rest", action="store_true", help="all parts but a")
    parser.add_argument("--parts", default="".join(PARTS), help="letters of the parts wanted, for example bc")
    parser.add_argument("--only", default="", help="only items whose name holds this text")
    parser.add_argument("--commit", help="what this tree is a copy of, where it has no .git")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU too")
    parser.add_argument("--plan", action="store_true", help="print what each part is expected to take, and do nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the file of rows: this is the process at work
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"--parts {options.parts}: there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: must be more than 0")
    return options


def chosen(options: argparse.Namespace) -> str:
    """The letters of the parts that the options ask for."""
    wanted = [part for part in PARTS if part in options.parts]
    return "".join(part for part in wanted if not (options.rest if part == CANARY else options.canary))


def work(options: argparse.Namespace) -> int:
    """Be the process at work: everything that is left, on the GPU."""
    started = time.monotonic()
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        if not options.smoke:
            print("no CUDA device: benchmarks/device.py measures a GPU; --smoke runs its code on a CPU", file=sys.stderr)
            return CANNOT
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of a kernel
        from fastlora.testing import repair_interpreter

        repair_interpreter()
    from fastlora.kernels import tiles
    from gpu.ahead import Ahead
    from gpu.plan import all_items
    from gpu.run import Run, carry_out
    from machine import environment

    header = environment(device, options.commit)
    same = {"gpu": header.get("gpu"), "tree": tree()}
    history = History([options.out, ON_GPUS], same)
    rows = Rows(options.worker, header | same | {"smoke": options.smoke}, more=True)
    arch = tiles.architecture(device) if device.type == "cuda" else 90
    items = [i for i in all_items(arch, device.type, options.smoke, chosen(options)) if options.only in i.key]
    left = history.left(items)
    rows.add({"row": "plan", "left": [i.key for i in left], "spare": [i.key for i in left if i.spare]})
    ahead = Ahead(left, arch, max(1, min(12, (os.cpu_count() or 2) - 2)))
    print(
        f"{header.get('gpu', 'CPU')}: {len(left)} of {len(items)} items left, "
        f"{sum(item.seconds for item in left):.0f} s expected, {options.seconds:.0f} s given", flush=True,
    )  # fmt: skip
    run = Run(device, rows, started + options.seconds, options.smoke, history, ahead)
    try:
        carry_out(run, items)
        rows.add({"row": "ahead", **ahead.counts()})
    finally:
        ahead.stop()
    return LOST if run.broken else RIGHT


def ask_for_a_worker(options: argparse.Namespace, parts: str, minutes: float, path: Path) -> Watch:
    """Have some parts done, watched, within these minutes."""
    command = [sys.executable, "-u", __file__, "--worker", str(path), "--parts", parts, "--out", str(options.out)]
    command += ["--only", options.only, *(["--commit", options.commit] if options.commit else [])]
    return supervise(command + ["--smoke"] * options.smoke, path, minutes)


def verdict(parts: str, rows: list[dict[str, Any]]) -> int:
    """The exit status that rows of some parts come to."""
    if any(row.get("refused") or row.get("failed") for row in rows if ours(row)):
        return WRONG
    spare = {item for row in rows if row["row"] == "plan" for item in row["spare"]}
    if CANARY in parts and set(not_reached(rows)) - spare:
        return UNFINISHED
    return RIGHT


def ours(row: dict[str, Any]) -> bool:
    """Whether a row is about the library: a rival that is refused, or fails, or does not fit in memory is a result."""
    return row.get("part") != "d" and str(row.get("contestant", "fastlora")).startswith("fastlora")


def not_reached(rows: list[dict[str, Any]]) -> list[str]:
    """The items that were left when the call began, and still are."""
    planned: list[str] = next((row["left"] for row in rows if row["row"] == "plan"), [])
    ended = {row["item"] for row in rows if row["row"] == "end"}
    return [item for item in planned if item not in ended]


def plan(parts: str) -> str:
    """What the parts are expected to take at full size: see gpu/plan.py."""
    from gpu.plan import all_items, table

    return table(all_items(90, "cuda", False, parts))


def half(options: argparse.Namespace, parts: str, minutes: float) -> int:
    """Have some parts done within these minutes, and print what came of them; the exit status."""
    from gpu.summary import summary

    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    path = options.out / f"{'canary' if parts == CANARY else 'rest'}-{stamp}-{os.getpid()}.jsonl"
    watch = ask_for_a_worker(options, parts, minutes, path)
    if watch.status == CANNOT:
        return CANNOT
    print(summary(watch.rows, not_reached(watch.rows)), flush=True)
    print(f"raw rows: {path}", flush=True)
    return verdict(parts, watch.rows) if watch.status in (0, LOST, KILLED) else WRONG


def main(arguments: list[str] | None = None) -> int:
    """Do what the options say; the exit status is explained above."""
    options = parse(arguments)
    if options.worker:
        return work(options)
    parts = chosen(options)
    if options.plan:
        print(plan(parts))
        return RIGHT
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the worker is ended, too
    options.out = options.out or (Path(tempfile.mkdtemp(prefix="fastlora-smoke-")) if options.smoke else ON_GPUS)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.smoke and parts == "".join(PARTS):
        print("at full size, on an H100:", plan(parts), sep="\n", flush=True)
    canary, rest = CANARY in parts, parts.replace(CANARY, "")
    minutes = options.minutes or (60.0 if options.smoke else MINUTES["canary"] * canary + MINUTES["rest"] * bool(rest))
    end = time.monotonic() + 60 * minutes
    status = RIGHT
    if canary:
        status = half(options, CANARY, min(minutes, MINUTES["canary"]) if rest and not options.smoke else minutes)
    if rest and status == RIGHT:
        status = half(options, rest, (end - time.monotonic()) / 60)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
