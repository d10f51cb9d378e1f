"""`fastlora demo`: the mini CLIP learns handwritten digits from 16 images of each, and a step is measured beside its rivals."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from . import datasets, models
from .batches import Draws
from .compare import Cost, compare
from .errors import UserError
from .evaluate import class_logits, encode_images, encode_prompts
from .lock import LOCK_FILES
from .prepare import prepare
from .recipe import ITERATIONS_PER_SHOT, Recipe
from .runfolder import RunFolder, write_json
from .shared import Shared
from .signals import Signals
from .trainer import Job
from .trainer import run as train

__all__ = ["run"]

SHOTS = 16
# A run of a few minutes needs a higher rate than the paper's 8000 steps, and a digit cannot be read from 8 % of its image.
LR, CROP_SCALE = 1e-2, (0.5, 1.0)
# In demo.json: by it a demo knows the one that was here before.
MADE_BY = "fastlora demo"


def run(out: Path, iterations: int, seed: int, console: Console) -> dict[str, Any]:
    """Run the demo into `out`; returns the metrics of the run with a "compare" entry.

    Raises:
        UserError: `out` holds something that is not a demo.
    """
    begun = time.monotonic()
    folder = RunFolder(out)
    try:
        recipe = Recipe(
            model=models.MINI, pretrained=None, shots=SHOTS, iterations=iterations, lr=LR, crop_scale=CROP_SCALE, seed=seed
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    with Signals("run it again"), folder.owned():
        _replace(folder)
        console.print(
            f"fastlora demo: the mini CLIP learns scikit-learn's handwritten digits from {SHOTS} images of each. To be short"
            f" it takes {iterations} of the paper's {ITERATIONS_PER_SHOT * SHOTS} steps, with a learning rate of {LR} instead"
            f" of 2e-4 and crops of at least {CROP_SCALE[0]:.0%} of an image instead of 8%.",
            highlight=False,
        )
        metrics = train(Job(recipe, "digits", out, device="cpu", again="fastlora demo, from the start"), console)
        costs = measure(recipe, console)
        metrics["compare"] = [vars(cost) for cost in costs]
        write_json(folder.metrics, metrics)
        console.print(cost_table(costs))
        console.print(
            f"zero-shot {metrics['zero_shot_accuracy']:.2f} % -> [bold]{metrics['accuracy']:.2f} %[/bold] of"
            f" {metrics['test_images']} images never trained on; {time.monotonic() - begun:.0f} s in all"
        )
        console.print(f"open {folder.report.resolve()}", soft_wrap=True, highlight=False)
        return metrics


def _replace(folder: RunFolder) -> None:
    """Remove the demo that is here, file by file, and say in demo.json that one will be; what else is here stays.

    Raises:
        UserError: `folder` holds a run that is no demo, or files that would be overwritten.
    """
    marker = folder.path / "demo.json"
    made = _made(folder, marker)
    if made and folder.log.is_dir() and (others := sorted(set(folder.log.iterdir()) - set(made))):
        raise UserError(f"--out {folder.path}: the demo did not make {others[0]}: choose another folder")
    for path in made:
        path.unlink(missing_ok=True)
    if made and folder.log.is_dir():
        folder.log.rmdir()
    folder.check({}, resume=False)
    if made or all(path.name in LOCK_FILES for path in folder.path.iterdir()):
        # first, so that a demo that was stopped is replaced as well
        write_json(marker, {"made by": MADE_BY, "host": socket.gethostname(), "process": os.getpid()})


def _made(folder: RunFolder, marker: Path) -> list[Path]:
    """The files of the demo that wrote `marker`; none if no demo wrote it."""
    try:
        said = json.loads(marker.read_text(encoding="utf-8"))
        if said["made by"] != MADE_BY:
            return []
        whose = f".{said['host']}.{said['process']}."  # TensorBoard puts both into its names
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if folder.config.exists():
        folder.read_config()
    logs = folder.log.glob("events.out.tfevents.*")
    return [*filter(Path.is_file, folder.files), *(path for path in logs if whose in path.name), marker]


def measure(recipe: Recipe, console: Console) -> list[Cost]:
    """The cost of one step of this recipe on digits, by fastlora, textbook LoRA and full fine-tuning, on the CPU.

    The rivals run the host's own encode_image and encode_text, fastlora its own, which give the same features.
    """
    device = torch.device("cpu")
    loaded = models.load(recipe.model, recipe.pretrained, device, recipe.quick_gelu)
    quiet = Console(quiet=True)
    data = prepare(datasets.load("digits"), recipe, loaded.framing, quiet, Shared())
    tokens = loaded.tokenizer(data.prompts())
    trained = data.training_set(recipe, loaded, device, quiet)
    draw = Draws(recipe, trained.store.sizes, trained.flip)(0)
    pixels = trained.store.fetch(draw)
    assert isinstance(pixels, Tensor), "a CPU's crops are sent"
    batch, targets = trained.normalise(pixels), trained.labels[draw.index]

    def ours(model: Any) -> Tensor:
        return F.cross_entropy(class_logits(model, encode_images(model, batch), encode_prompts(model, tokens)), targets)

    def host(model: Any) -> Tensor:
        image, text = model.encode_image(batch, normalize=True), model.encode_text(tokens, normalize=True)
        return F.cross_entropy(class_logits(model, image, text), targets)

    console.print(f"measuring one step of {len(batch)} images and {len(tokens)} prompts, three ways")
    return compare(loaded.model, recipe.lora, ours, host)


def cost_table(costs: list[Cost]) -> Table:
    """Time and memory of each, and their ratio to the first."""
    table = Table("one training step", "seconds", "", "saved for backward", "", "trained parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    first = costs[0]
    for cost in costs:
        table.add_row(
            cost.name, f"{cost.seconds:.3f}", f"{cost.seconds / first.seconds:.2f} ×", f"{cost.saved_bytes / 2**20:.0f} MiB",
            f"{cost.saved_bytes / first.saved_bytes:.2f} ×", f"{cost.trainable:,}",
        )  # fmt: skip
    return table
