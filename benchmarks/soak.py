"""A long run on the mini CLIP: memory stays flat, and what is killed and resumed ends where an undisturbed run does.

    python benchmarks/soak.py --steps 3000 --kills 6 --out soak.jsonl

Three things are recorded, a row each: the resident memory of a whole `fastlora train` over its steps; the same run killed by
SIGTERM and SIGKILL in turn, at random moments, and resumed, held against the undisturbed one bit for bit (losses, adapter,
predictions); and the loss of the engines that run here, step by step, from the same start.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastlora
from fastlora.fewshot import datasets, models
from fastlora.fewshot.engines import graphed
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.prepare import prepare
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.shared import Shared
from machine import environment
from rows import RESULTS, Rows, read_rows

RECIPE: dict[str, Any] = {"model": "mini", "pretrained": None, "lr": 1e-3, "crop_scale": (0.5, 1.0), "seed": 1}
OUT = RESULTS / "soak.jsonl"
CHECKPOINT_STEPS = 50
SAMPLE_SECONDS = 0.5


def command(out: Path, args: argparse.Namespace) -> list[str]:
    """`fastlora train` of the soak's recipe into `out`; the same command begins and resumes a run."""
    options = {
        "shots": 16, "iterations": args.steps, "batch-size": args.batch_size, "lr": RECIPE["lr"], "seed": RECIPE["seed"],
        "checkpoint-steps": CHECKPOINT_STEPS, "device": "cpu", "engine": "eager",
    }  # fmt: skip
    line = [sys.executable, "-m", "fastlora", "train", "digits", "--out", str(out), "--model", "mini", "--pretrained", "none"]
    for name, value in options.items():
        line += [f"--{name}", str(value)]
    return [*line, "--crop-scale", *map(str, RECIPE["crop_scale"]), *(["--resume"] if out.exists() else [])]


def resident(process: int) -> int:
    """Bytes of memory that a process holds; 0 once it is gone."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS")), 0)
    except OSError:
        return 0


def follow(process: subprocess.Popen[bytes], until: Callable[[], bool]) -> list[int]:
    """Resident memory of a process, sampled until it ends or `until` says so."""
    samples = []
    while process.poll() is None and not until():
        samples.append(resident(process.pid))
        time.sleep(SAMPLE_SECONDS)
    return samples


def _past(until: float) -> bool:
    return time.monotonic() > until


def start(out: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(out, args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)


def undisturbed(out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One run from start to end; its memory while it trains, from the first checkpoint on."""
    with start(out, args) as process:
        follow(process, (out / "checkpoint.pt").exists)
        samples = [size for size in follow(process, (out / "adapter.safetensors").exists) if size]
    if process.returncode:
        raise RuntimeError(f"the undisturbed run failed with {process.returncode}")
    tenths = [round(samples[min(len(samples) - 1, i * len(samples) // 10)] / 2**20, 1) for i in range(11)]
    half = sorted(samples[: len(samples) // 2]), sorted(samples[len(samples) // 2 :])
    early, late = (part[len(part) // 2] for part in half)
    return {"row": "memory", "rss_mib": tenths, "median_growth": round(late / early - 1, 4), "samples": len(samples)}


def killed(out: Path, reference: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The same run, killed and resumed, beside the undisturbed one."""
    draw = random.Random(args.seed)
    kills: list[dict[str, Any]] = []
    while True:
        with start(out, args) as process:
            if len(kills) == args.kills:
                if process.wait():
                    raise RuntimeError(f"the last resumption failed with {process.returncode}")
                break
            # at any moment: while it imports, loads, tests, trains or writes a checkpoint
            until = time.monotonic() + draw.uniform(0.5, 2 * args.steps * args.step_seconds / args.kills)
            follow(process, partial(_past, until))
            if process.poll() is not None:
                break
            number = (signal.SIGTERM, signal.SIGKILL)[len(kills) % 2]
            process.send_signal(number)
            process.wait()
        kills.append({"signal": number.name, "exit": process.returncode, "checkpoint": (out / "checkpoint.pt").exists()})
    same = {
        name: (out / name).read_bytes() == (reference / name).read_bytes()
        for name in ("history.csv", "adapter.safetensors", "predictions.csv")
    }
    return {"row": "killed", "kills": kills, "same_bits": same}


def engines(args: argparse.Namespace) -> dict[str, Any]:
    """Losses of the captured form of a step, replayed without a graph on a CPU, beside the eager engine on the same batches."""
    device, quiet = torch.device("cuda" if torch.cuda.is_available() else "cpu"), Console(quiet=True)
    recipe = Recipe(shots=16, iterations=args.engine_steps, batch_size=args.batch_size, **RECIPE)

    def begin(engine: str) -> Loop:
        loaded = models.load(recipe.model, recipe.pretrained, device)
        data = prepare(datasets.load("digits"), recipe, loaded.framing, quiet, Shared())
        tokens = loaded.tokenise(data.templates, data.dataset.classes).to(device)
        torch.manual_seed(recipe.seed)
        fastlora.patch(loaded.model, recipe.lora)
        trained = data.training_set(recipe, loaded, device, quiet)
        loop = Loop(loaded.model, recipe, trained, tokens, None, engine=engine)
        loop.draws = dataclasses.replace(loop.draws, fill=True)
        return loop

    eager, other = begin("eager"), begin("graph" if device.type == "cuda" else "eager")
    if device.type == "cpu":
        other._run = graphed(other._step, other.inputs(0), lambda step: step)
    before = resident(os.getpid())
    for _ in range(args.engine_steps):
        eager.train_step()
        other.train_step()
    eager.read()
    other.read()
    apart = (eager.history[:, 0] - other.history[:, 0]).abs()
    return {
        "row": "engines", "steps": args.engine_steps, "largest_loss_difference": float(apart.max()),
        "last_loss": float(eager.history[-1, 0]), "rss_growth_mib": round((resident(os.getpid()) - before) / 2**20, 1),
        "other": "graph" if device.type == "cuda" else "the captured form, replayed without a graph",
    }  # fmt: skip


def text() -> str:
    """What the committed rows say, in a few lines of Markdown."""
    if not OUT.exists():
        return "Not yet measured."
    memory, broken, engine = read_rows(OUT)[1:]
    signals = ", ".join(kill["signal"] for kill in broken["kills"])
    same = "bit for bit the same" if all(broken["same_bits"].values()) else f"not the same: {broken['same_bits']}"
    return (
        f"* {memory['steps']} steps, batch {memory['batch_size']}: the process held {memory['rss_mib'][0]:.0f} MiB at the first"
        f" checkpoint and {memory['rss_mib'][-1]:.0f} MiB at the end.\n"
        f"* The same run stopped {len(broken['kills'])} times at random moments ({signals}) and resumed: losses, adapter and"
        f" predictions are {same}.\n"
        f"* {engine['steps']} steps by the eager engine and by {engine['other']}: losses differ by at most"
        f" {engine['largest_loss_difference']:.1g}."
    )


def main() -> None:
    """Run the soak and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--engine-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1, help="of the moments of the kills")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = Rows(args.out, environment(torch.device("cpu")))
    common = {"steps": args.steps, "batch_size": args.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "undisturbed"
        begun = time.monotonic()
        rows.add(common | undisturbed(reference, args))
        args.step_seconds = (time.monotonic() - begun) / args.steps
        rows.add(common | killed(Path(folder) / "killed", reference, args))
    rows.add(common | engines(args))


if __name__ == "__main__":
    main()
