"""`fastlora demo`: the mini CLIP learns handwritten digits from 16 images of each, and a step is measured beside its rivals."""

from __future__ import annotations

import shutil
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
from .prepare import prepare
from .recipe import ITERATIONS_PER_SHOT, Recipe
from .runfolder import RunFolder, write_json
from .shared import Shared
from .trainer import Job
from .trainer import run as train

__all__ = ["run"]

SHOTS = 16
# A run of a few minutes needs a higher rate than the paper's 8000 steps, and a digit cannot be read from 8 % of its image.
LR, CROP_SCALE = 1e-2, (0.5, 1.0)


def run(out: Path, iterations: int, seed: int, console: Console) -> dict[str, Any]:
    """Run the demo into `out`; returns the metrics of the run with a "compare" entry.

    Raises:
        UserError: `out` holds something that is not a demo.
    """
    begun = time.monotonic()
    folder = RunFolder(out)
    marker = folder.path / "demo.json"
    if marker.is_file():
        shutil.rmtree(out)
    try:
        recipe = Recipe(
            model=models.MINI, pretrained=None, shots=SHOTS, iterations=iterations, lr=LR, crop_scale=CROP_SCALE, seed=seed
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    console.print(
        f"fastlora demo: the mini CLIP learns scikit-learn's handwritten digits from {SHOTS} images of each. To be short"
        f" it takes {iterations} of the paper's {ITERATIONS_PER_SHOT * SHOTS} steps, with a learning rate of {LR} instead"
        f" of 2e-4 and crops of at least {CROP_SCALE[0]:.0%} of an image instead of 8%.",
        highlight=False,
    )
    folder.check({}, resume=False)
    if not out.exists() or not any(out.iterdir()):
        folder.create()
        write_json(marker, {"iterations": iterations})  # first, so that a demo that was stopped is replaced as well
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
