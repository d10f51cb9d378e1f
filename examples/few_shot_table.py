"""The table of docs/results.md: the mini CLIP on Caltech101 and digits, LoRA beside other ways to adapt it.

    python examples/few_shot_table.py --root data --out runs/table

Every row of the grid (data set, method, shots, seed) is one run of the few-shot job. A run that is done is not done again, so
a stopped table goes on where it was. Raw rows go to benchmarks/results/few_shot.jsonl, the table to docs/results.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console

from fastlora.config import LoRAConfig
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.trainer import Job, run

HOME = Path(__file__).resolve().parents[1]
ROWS, PAGE = HOME / "benchmarks" / "results" / "few_shot.jsonl", HOME / "docs" / "results.md"
BEGIN, END = "<!-- few-shot table -->", "<!-- end of few-shot table -->"
DATA = ("digits", "caltech101")
SHOTS, SEEDS = (1, 4, 16), (1, 2, 3)
# A fifth of the paper's 500 steps a shot: 2 CPU cores, and a model a thirtieth the size.
ITERATIONS_PER_SHOT = 100
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, the paper's recipe": {"method": "lora"},
    "LoRA, rank 8, lr 1e-3": {"method": "lora", "lr": 1e-3, "lora": LoRAConfig(rank=8)},
    "full fine-tuning": {"method": "full", "lr": 1e-4},
    "linear probe": {"method": "linear-probe"},
}


def recipe(method: str, shots: int, seed: int, precision: str) -> Recipe:
    values = METHODS[method]
    steps = {"iterations": ITERATIONS_PER_SHOT * shots} if values["method"] != "linear-probe" else {}
    return Recipe(model="mini", pretrained=None, shots=shots, seed=seed, precision=precision, **steps, **values)


def run_all(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One row a run, in the order of the grid."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True).stdout.strip()
    rows = []
    for data in args.data:
        for shots in SHOTS:
            for method in METHODS:
                for seed in SEEDS:
                    name = f"{data}-{shots}-{method.replace(', ', '-').replace(' ', '_')}-{seed}"
                    console.rule(name)
                    job = Job(recipe(method, shots, seed, args.precision), data, args.out / name, args.root, resume=True)
                    metrics = run(job, console)
                    row = {"data": data, "shots": shots, "method": method, "seed": seed}
                    row |= {key: metrics[key] for key in ("accuracy", "zero_shot_accuracy", "test_images")}
                    training = metrics.get("training", {})
                    row |= {key: training.get(key) for key in ("steps", "seconds", "trainable_parameters")}
                    rows.append(row | {"commit": commit, "date": datetime.date.today().isoformat(), **metrics["environment"]})
                    ROWS.parent.mkdir(parents=True, exist_ok=True)
                    ROWS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean ± standard deviation over seeds, in percent."""
    shots = sorted({row["shots"] for row in rows})
    lines = ["| data | method | " + " | ".join(f"{s} shot{'s' * (s > 1)}" for s in shots) + " |", "|---|---|" + "---|" * len(shots)]
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        lines.append(f"| {data} | zero-shot | " + " | ".join([f"{of_data[0]['zero_shot_accuracy']:.1f}"] * len(shots)) + " |")
        for method in dict.fromkeys(row["method"] for row in of_data):
            cells = []
            for s in shots:
                values = [row["accuracy"] for row in of_data if (row["method"], row["shots"]) == (method, s)]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
            lines.append(f"| {data} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page(rows: list[dict[str, Any]]) -> None:
    """Put the table between its two marks in docs/results.md."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds caltech-101")
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="folder of the runs")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_args()
    console = Console()
    rows = run_all(args, console)
    write_page(rows)
    console.print(table(rows))


if __name__ == "__main__":
    main()
