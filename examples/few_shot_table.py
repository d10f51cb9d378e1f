"""The table of docs/results.md: the mini CLIP on Caltech101 and digits, LoRA beside other ways to adapt it.

    python examples/few_shot_table.py --root data --out runs/table --precision bf16

Every row of the grid (data set, method, shots, seed) is one run of the few-shot job. A run that is done is not done again, so
a stopped table goes on where it was, and several processes may each take a data set; `--render` makes the table of what is
done. Raw rows go to benchmarks/results/few_shot.jsonl, the table to docs/results.md and
README.md.
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

from fastlora.config import TARGETS, LoRAConfig
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.trainer import Job, run

HOME = Path(__file__).resolve().parents[1]
ROWS = HOME / "benchmarks" / "results" / "few_shot.jsonl"
PAGES = {HOME / "docs" / "results.md": (1, 4, 16), HOME / "README.md": (16,)}
BEGIN, END = "<!-- few-shot table -->", "<!-- end of few-shot table -->"
DATA = ("digits", "caltech101")
SHOTS, SEEDS = (16, 4, 1), (1, 2, 3)
# Far fewer than the paper's 500 steps a shot: what 2 CPU cores can do. With few steps the paper's learning rate of 2e-4 hardly
# moves a model this small, so LoRA and full fine-tuning each have the best of the rates tried at 150 steps.
STEPS = {1: 40, 4: 80, 16: 300}
CROPS = (0.3, 1.0)
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": "lora", "lr": 3e-3, "lora": LoRAConfig(rank=16, alpha=8.0, targets=TARGETS)},
    "full fine-tuning": {"method": "full", "lr": 5e-4},
    "linear probe": {"method": "linear-probe"},
}


def recipe(method: str, shots: int, seed: int, precision: str) -> Recipe:
    values = METHODS[method]
    mini: dict[str, Any] = {"model": "mini", "pretrained": None, "precision": precision, "crop_scale": CROPS}
    return Recipe(shots=shots, seed=seed, iterations=STEPS[shots], **mini, **values)


def run_all(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """One row a run, in the order of the grid."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HOME, capture_output=True, text=True).stdout.strip()
    rows = []
    for data in args.data:
        for shots in SHOTS:
            for method in METHODS:
                for seed in SEEDS:
                    name = f"{data}-{shots}-{method.replace(', ', '-').replace(' ', '_')}-{seed}"
                    if args.render:
                        if not (args.out / name / "metrics.json").is_file():
                            continue
                        metrics = json.loads((args.out / name / "metrics.json").read_text())
                    else:
                        console.rule(name)
                        job = Job(recipe(method, shots, seed, args.precision), data, args.out / name, args.root, resume=True)
                        metrics = run(job, console)
                    row = {"data": data, "shots": shots, "method": method, "seed": seed}
                    row |= {key: metrics[key] for key in ("accuracy", "zero_shot_accuracy", "test_images")}
                    training = metrics.get("training", {})
                    row |= {key: training.get(key) for key in ("steps", "seconds", "trainable_parameters")}
                    rows.append(row | {"commit": commit, "date": datetime.date.today().isoformat(), **metrics["environment"]})
    return rows


def table(rows: list[dict[str, Any]], shots: tuple[int, ...] = PAGES[HOME / "docs" / "results.md"]) -> str:
    """Markdown: mean ± standard deviation over seeds, in percent; a number of seeds other than three is said."""
    heads = " | ".join(f"{s} shot{'s' * (s > 1)}" for s in shots)
    lines = [f"| data | method | {heads} |", "|---|---|" + "---|" * len(shots)]
    for data in dict.fromkeys(row["data"] for row in rows):
        of_data = [row for row in rows if row["data"] == data]
        lines.append(f"| {data} | zero-shot | " + " | ".join([f"{of_data[0]['zero_shot_accuracy']:.1f}"] * len(shots)) + " |")
        for method in dict.fromkeys(row["method"] for row in of_data):
            cells = []
            for s in shots:
                values = [row["accuracy"] for row in of_data if (row["method"], row["shots"]) == (method, s)]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                missing = f" ({len(values)} of {len(SEEDS)} seeds)" if len(values) != len(SEEDS) else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}{missing}" if values else "not run")
            lines.append(f"| {data} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(path: Path, rows: list[dict[str, Any]]) -> str:
    """The text of a page with the table of its shots between the two marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows, PAGES[path])}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder that holds caltech-101")
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="folder of the runs")
    parser.add_argument("--data", nargs="+", choices=DATA, default=DATA)
    parser.add_argument("--render", action="store_true", help="run nothing, make the table of what is done")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    args = parser.parse_args()
    console = Console()
    rows = run_all(args, console)
    if args.render or tuple(args.data) == DATA:
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for path in PAGES:
            path.write_text(page(path, rows), encoding="utf-8")
    console.print(table(rows))


if __name__ == "__main__":
    main()
