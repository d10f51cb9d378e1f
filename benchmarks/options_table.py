"""The table of docs/options.md: each option beyond the paper's recipe, and each other recipe, against the plain one.

    python benchmarks/options_table.py --root data --also TINY_IMAGENET_FOLDER --out runs/options

The mini CLIP, 4 shots, three seeds, Caltech101 and digits; TINY_IMAGENET_FOLDER holds held-out images of the classes that the
mini CLIP was pretrained on, one folder a class: what a run forgets is measured there. A row is written when its run is done,
and a run that has its row is not done again. benchmarks/pages.py puts the table into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.config import TARGETS, LoRAConfig
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.shared import Shared
from fastlora.fewshot.trainer import Job, run

HOME = Path(__file__).resolve().parents[1]
ROWS = HOME / "benchmarks" / "results" / "options.jsonl"
SHOTS, SEEDS, STEPS = 4, (1, 2, 3), 80
TEMPLATES = ("a photo of a {}.", "a close-up photo of a {}.", "a drawing of a {}.", "a small {}.")
LORA = LoRAConfig(rank=16, alpha=8.0, targets=TARGETS)
# By block of each tower: half the rank below, half more above.
RANKS: dict[str | int, int] = {block: 8 if block < 3 else 24 for block in range(7)}
# The plain recipe is that of examples/sweeps/caltech101.yaml at 4 shots; everything else changes one thing of it.
PLAIN: dict[str, Any] = {"lr": 3e-3, "lora": LORA}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain LoRA": {},
    "KL to zero-shot, λ 0.1, T 8": {"kl_weight": 0.1},
    "4 templates, averaged": {"template": TEMPLATES},
    "LoRA+, ratio 4": {"lr_ratio": 4.0},
    "LoRA+, ratio 4, rate ÷ 4": {"lr_ratio": 4.0, "lr": PLAIN["lr"] / 4},
    "average of the last 25 %": {"average": 0.25},
    "rank 8 in blocks 0-2, 24 above": {"lora": dataclasses.replace(LORA, rank_pattern=RANKS)},
    "full fine-tuning": {"method": "full", "lr": 5e-4},
    "linear probe": {"method": "linear-probe"},
    "Tip-Adapter-F": {"method": "tip-adapter-f"},
    "CoOp": {"method": "coop"},
}
DATA = ("digits", "caltech101")


def recipe(option: str, seed: int, precision: str) -> Recipe:
    values = {**PLAIN, **OPTIONS[option]}
    mini: dict[str, Any] = {"model": "mini", "pretrained": None, "precision": precision, "crop_scale": (0.3, 1.0)}
    return Recipe(shots=SHOTS, iterations=STEPS, seed=seed, **mini, **values)


def rows_so_far() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.is_file() else []


def measure(args: argparse.Namespace, console: Console) -> None:
    """Run what has no row yet."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True).stdout.strip()
    done = {(row["data"], row["option"], row["seed"]) for row in rows_so_far()}
    also = (str(args.also),) if args.also else ()
    for data in args.data:
        shared = Shared()
        for option in args.options:
            for seed in SEEDS:
                if (data, option, seed) in done:
                    continue
                console.rule(f"{data}, {option}, seed {seed}")
                chosen = recipe(option, seed, args.precision)
                others = also if chosen.names_any_class else ()
                args.out.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=args.out) as out:
                    metrics = run(Job(chosen, data, Path(out), args.root, brief=True, also=others), console, shared)
                row = {"data": data, "option": option, "shots": SHOTS, "seed": seed, "steps": STEPS if chosen.trains else None}
                row |= {key: metrics[key] for key in ("accuracy", "zero_shot_accuracy", "test_images")}
                row["ece"] = metrics["calibration"]["ece"]
                row["pretraining_classes"] = {k: metrics["also"][0][k] for k in ("zero_shot", "accuracy")} if others else None
                row["seconds"] = metrics.get("training", {}).get("seconds")
                row |= {"commit": args.commit or commit, "date": datetime.date.today().isoformat(), **metrics["environment"]}
                with open(ROWS, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds in percent, and the mean difference to plain LoRA of the same seeds."""
    lines = [
        "| data | option | accuracy | against plain, seed by seed | ECE | pretraining classes |",
        "|---|---|---|---|---|---|",
    ]
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        plain = {row["seed"]: row["accuracy"] for row in of_data if row["option"] == "plain LoRA"}
        for option in [name for name in OPTIONS if any(row["option"] == name for row in of_data)]:
            mine = [row for row in of_data if row["option"] == option]
            gaps = [row["accuracy"] - plain[row["seed"]] for row in mine if row["seed"] in plain]
            gap = (
                f"{statistics.mean(gaps):+.1f} ({', '.join(f'{g:+.1f}' for g in gaps)})"
                if gaps and option != "plain LoRA"
                else "–"
            )
            missing = f" ({len(mine)} of {len(SEEDS)} seeds)" if len(mine) < len(SEEDS) else ""
            kept = [row["pretraining_classes"]["accuracy"] for row in mine if row["pretraining_classes"]]
            cells = _mean([row["accuracy"] for row in mine]) + missing, gap, _mean([row["ece"] for row in mine]), _mean(kept)
            lines.append(f"| {data} | {option} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds caltech-101")
    parser.add_argument("--also", type=Path, help="folder of held-out images of the pretraining classes")
    parser.add_argument("--out", type=Path, default=Path("runs/options"), help="where runs do their work")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--commit", help="what the rows say, where this is not a git checkout")
    args = parser.parse_args()
    console = Console()
    measure(args, console)
    console.print(table(rows_so_far()))


if __name__ == "__main__":
    main()
