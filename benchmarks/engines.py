"""Accuracy of each engine beside a plain loop: the same images, crops and steps, three seeds.

    python benchmarks/engines.py --root DATA                # digits, and Caltech101 in CoOp's layout below DATA
    python benchmarks/engines.py                            # digits alone

The plain loop is what one would write from the paper: textbook LoRA on separate q, k, v, the host's own encoders at 77 tokens,
torch's dropout, AdamW and a cosine schedule. A row each is added to
benchmarks/results/engines.jsonl; what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import fastlora
from baselines.common import SeparateAttention, blocks
from baselines.textbook import NaiveLinear
from fastlora.config import LoRAConfig
from fastlora.fewshot import datasets, models
from fastlora.fewshot.batches import Draws
from fastlora.fewshot.crops import Normalise, crop_on_cpu
from fastlora.fewshot.evaluate import Exam, evaluate
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.prepare import Prepared, prepare
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.shared import Shared
from machine import environment
from rows import RESULTS

LORA = LoRAConfig(rank=16, alpha=8.0)
COMMON: dict[str, Any] = {"model": "mini", "pretrained": None, "lr": 3e-3, "crop_scale": (0.3, 1.0), "lora": LORA}
SETS: dict[str, dict[str, Any]] = {"digits": {"shots": 4, "iterations": 80}, "caltech101": {"shots": 4, "iterations": 80}}
OUT = RESULTS / "engines.jsonl"
WAYS = ("plain loop", "eager", "compile")
CPU, QUIET = torch.device("cpu"), Console(quiet=True)


def textbook(model: Any, recipe: Recipe) -> None:
    """Textbook LoRA on separate q, k, v of every block, in place, from the A that `fastlora.patch` draws; the rest frozen."""
    lora = recipe.lora
    fastlora.patch(model, lora)
    every = [block for tower in blocks(model).values() for block in tower]
    starts = [block.attn.lora_A.detach().clone() for block in every]
    fastlora.unpatch(model)
    model.requires_grad_(False).eval()
    for block, start in zip(every, starts, strict=True):
        block.attn = SeparateAttention(block.attn)
        for i, (linear, a) in enumerate(zip(block.attn.projections, start, strict=True)):
            b = torch.zeros(linear.out_features, lora.rank)
            block.attn.projections[i] = NaiveLinear(linear, a, b, lora.alpha / math.sqrt(lora.rank), lora.dropout).train()


def plainly(model: Any, recipe: Recipe, data: Prepared, tokens: Tensor, normalise: Normalise) -> None:
    """Train as a plain loop does; which images and crops a step sees is drawn as the trainer draws it."""
    textbook(model, recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    images = [data.decoded.images[item.name] for item in data.shots.train]
    labels = torch.tensor([item.label for item in data.shots.train])
    draws = Draws(recipe, torch.tensor([image.shape[-2:] for image in images]), data.flip)
    for step in range(recipe.steps):
        draw = draws(step)
        batch = normalise(crop_on_cpu([images[i] for i in draw.index], draw.boxes, model.visual.image_size[0]))
        image, text = F.normalize(model.encode_image(batch), dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
        loss = F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels[draw.index])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimizer.step()


def run(name: str, root: Path | None, way: str, seed: int, shared: Shared) -> dict[str, Any]:
    """Accuracy in percent after training one way, and the seconds of training."""
    recipe = Recipe(seed=seed, **SETS[name], **COMMON)
    loaded = models.load(recipe.model, recipe.pretrained, CPU, recipe.quick_gelu)
    data = prepare(datasets.load(name, root or Path()), recipe, loaded.framing, QUIET, shared)
    tokens = loaded.tokenise(data.templates, data.dataset.classes)
    normalise = Normalise(loaded.mean, loaded.std, CPU)
    torch.manual_seed(seed)
    begun = time.monotonic()
    if way == "plain loop":
        plainly(loaded.model, recipe, data, tokens.flatten(0, -2), normalise)
    else:
        fastlora.patch(loaded.model, recipe.lora)
        loop = Loop(loaded.model, recipe, data.training_set(recipe, loaded, CPU, QUIET), tokens, None, engine=way)
        while loop.step < recipe.steps:
            loop.train_step()
        assert loop.engine == way, f"{way} fell back to {loop.engine}"
    seconds = time.monotonic() - begun
    exam = Exam("test", data.dataset.classes, data.test, tokens)
    if way == "plain loop":  # our encoders do not know a textbook's attention
        accuracy = host_accuracy(loaded.model, exam, normalise)
    else:
        accuracy = evaluate(loaded.model, exam, normalise, None, QUIET).accuracy
    return {"accuracy": round(accuracy, 4), "seconds": round(seconds, 1), "steps": recipe.steps}


@torch.no_grad()
def host_accuracy(model: Any, exam: Exam, normalise: Normalise) -> float:
    """Top-1 in percent by the host's own encoders."""
    model.eval()
    text = F.normalize(model.encode_text(exam.tokens.flatten(0, -2)), dim=-1)
    right = [(F.normalize(model.encode_image(normalise(pixels)), dim=-1) @ text.T).argmax(1) == labels
             for pixels, labels in exam.images.batches(128)]  # fmt: skip
    return 100 * torch.cat(right).double().mean().item()


def plan(root: Path | None, seeds: int) -> Iterator[tuple[str, int, str]]:
    """What is to be run: set, seed, way; those that compile last."""
    for way in WAYS:
        for name in SETS if root else ("digits",):
            yield from ((name, seed, way) for seed in range(1, seeds + 1))


def table() -> str:
    """The rows so far as Markdown: mean and spread of accuracy over seeds, and each seed's gap to the plain loop."""
    rows = list(map(json.loads, OUT.read_text().splitlines())) if OUT.exists() else []
    lines = ["| data | trained by | top-1 | over the plain loop, seed by seed |", "|---|---|---:|---:|"]
    for data in dict.fromkeys(row["data"] for row in rows):
        found = {(row["way"], row["seed"]): row["accuracy"] for row in rows if row["data"] == data}
        for way in (way for way in WAYS if any(w == way for w, _ in found)):
            mine = {seed: accuracy for (w, seed), accuracy in found.items() if w == way}
            gaps = ", ".join(f"{a - found[WAYS[0], seed]:+.1f}" for seed, a in mine.items() if (WAYS[0], seed) in found)
            spread = f" ± {statistics.stdev(mine.values()):.1f}" if len(mine) > 1 else ""
            lines.append(
                f"| {data} | {way} | {statistics.mean(mine.values()):.1f}{spread} | {'–' if way == WAYS[0] else gaps} |"
            )
    return "\n".join(lines) if rows else "Not yet measured."


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder that holds Caltech101 in CoOp's layout; without it, digits alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    there = {(row["data"], row["seed"], row["way"]) for row in map(json.loads, lines)}
    shared, common = Shared(), environment(CPU)
    for name, seed, way in plan(args.root, args.seeds):
        if (name, seed, way) in there:
            continue
        row = {"row": "engine", "data": name, "seed": seed, "way": way, **run(name, args.root, way, seed, shared), **common}
        print(f"{name}, seed {seed}, {way}: {row['accuracy']:.1f} % in {row['seconds']:.0f} s", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
