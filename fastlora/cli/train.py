"""`fastlora train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import ENCODERS, LAYERS, SCALINGS, TARGETS, LoRAConfig
from ..fewshot.reading import Reading
from ..fewshot.recipe import METHODS, PRECISIONS, Recipe, one_or_all
from .app import (
    DATA_HELP,
    DEVICE_HELP,
    ClassNames,
    ImageColumn,
    LabelColumn,
    Root,
    SplitColumn,
    Validation,
    app,
    console,
    valid,
)

__all__ = ["train"]

PAPER = "a photo of a {}."


# The panels of --help.
MODEL, LORA, TRAINING, BEYOND, TESTS, RUNNING = "Model", "LoRA", "Training", "Beyond the paper (all off)", "Tests", "Running"


@app.command()
def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for everything the run leaves behind.")],
    shots: Annotated[int, typer.Option(help="Labelled images per class to train on.")] = Recipe.shots,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; all but the first for comparison.")] = Recipe.method,
    seed: Annotated[int, typer.Option(help="Of the images drawn, their order and crops, the adapters, dropout.")] = Recipe.seed,
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    validation: Validation = Reading.validation,
    root: Root = Path("data"),
    model: Annotated[
        str, typer.Option(help="An open_clip model, or mini, which comes with fastlora.", rich_help_panel=MODEL)
    ] = Recipe.model,
    pretrained: Annotated[
        str,
        typer.Option(
            help="An open_clip tag or a checkpoint file; none for random weights. mini has its own.", rich_help_panel=MODEL
        ),
    ] = "openai",
    quick_gelu: Annotated[
        bool | None,
        typer.Option(
            "--quick-gelu/--no-quick-gelu",
            help="Whether a checkpoint file was trained with QuickGELU.",
            rich_help_panel=MODEL,
            show_default="what the weights say; else asked for",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="The prompt, {} for the class name, or a file of them, or own for CoOp's of one of its sets. Several (lines,"
            " or the option again) are averaged.",
            rich_help_panel=MODEL,
            show_default=f'"{PAPER}"; digits: "a photo of the digit {{}}."',
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of each update, 1 to 128.", rich_help_panel=LORA)] = LoRAConfig.rank,
    alpha: Annotated[float, typer.Option(help="Numerator of the scaling.", rich_help_panel=LORA)] = LoRAConfig.alpha,
    dropout: Annotated[
        float, typer.Option(help="Probability of dropping an input of the LoRA branch, in [0, 1).", rich_help_panel=LORA)
    ] = LoRAConfig.dropout,
    scaling: Annotated[
        str, typer.Option(help=f"The factor before B(Ax): {' or '.join(SCALINGS)}.", rich_help_panel=LORA)
    ] = LoRAConfig.scaling,
    targets: Annotated[
        str, typer.Option(help=f"Adapted projections, with commas, of {', '.join(TARGETS)}.", rich_help_panel=LORA)
    ] = ",".join(LoRAConfig.targets),
    encoders: Annotated[
        str, typer.Option(help="Adapted encoders, with commas, of vision, text.", rich_help_panel=LORA)
    ] = ",".join(ENCODERS),
    layers: Annotated[
        str, typer.Option(help=f"{', '.join(LAYERS)}, or block numbers from 0 with commas: 0,1,11.", rich_help_panel=LORA)
    ] = str(LoRAConfig.layers),
    iterations: Annotated[
        int | None, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING, show_default="500 a shot")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.", rich_help_panel=TRAINING)] = Recipe.batch_size,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", rich_help_panel=TRAINING, show_default="2e-4; 1e-5 for full, 2e-3 for coop"),
    ] = None,
    lr_min: Annotated[float, typer.Option(help="Where the cosine schedule ends.", rich_help_panel=TRAINING)] = Recipe.lr_min,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.", rich_help_panel=TRAINING)] = Recipe.weight_decay,
    betas: Annotated[tuple[float, float], typer.Option(help="AdamW's betas.", rich_help_panel=TRAINING)] = Recipe.betas,
    crop_scale: Annotated[
        tuple[float, float],
        typer.Option(help="Smallest and largest share of the area that a training crop takes.", rich_help_panel=TRAINING),
    ] = Recipe.crop_scale,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Mirror half of the training images.",
            rich_help_panel=TRAINING,
            show_default="yes; digits: no",
        ),
    ] = None,
    max_side: Annotated[
        int,
        typer.Option(help="Training images with a longer shorter side, in pixels, are shrunk once.", rich_help_panel=TRAINING),
    ] = Recipe.max_side,
    rank_pattern: Annotated[
        str,
        typer.Option(
            help="Other ranks, by block or module, with commas; 0 for none: 0=0,11=8,visual.*=4.",
            rich_help_panel=BEYOND,
            show_default="none",
        ),
    ] = "",
    kl_weight: Annotated[
        float, typer.Option(help="Times T² KL(zero-shot, adapted), added to the loss; try 0.1.", rich_help_panel=BEYOND)
    ] = Recipe.kl_weight,
    kl_temperature: Annotated[
        float, typer.Option(help="T, by which both logits are divided in it.", rich_help_panel=BEYOND)
    ] = Recipe.kl_temperature,
    lr_ratio: Annotated[
        float, typer.Option(help="Learning rate of B over that of A, as in LoRA+; try 4 to 16.", rich_help_panel=BEYOND)
    ] = Recipe.lr_ratio,
    average: Annotated[
        float,
        typer.Option(help="Share of the last steps whose weights are averaged in the end; try 0.25.", rich_help_panel=BEYOND),
    ] = Recipe.average,
    share_prefix: Annotated[
        bool,
        typer.Option(
            "--share-prefix", help="Compute what all prompts begin with once; it then has one mask.", rich_help_panel=BEYOND
        ),
    ] = Recipe.share_prefix,
    base_to_new: Annotated[
        bool,
        typer.Option(
            "--base-to-new",
            help="Train on the first half of the classes, test each half by its own words.",
            rich_help_panel=TESTS,
        ),
    ] = Recipe.base_to_new,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="Another data set to test before and after; may be repeated.",
            rich_help_panel=TESTS,
            show_default="none",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(PRECISIONS)}; auto is bf16 on a GPU that has it, else fp16, on the CPU fp32.",
            rich_help_panel=RUNNING,
        ),
    ] = Recipe.precision,
    device: Annotated[str, typer.Option(help=DEVICE_HELP, rich_help_panel=RUNNING)] = "auto",
    engine: Annotated[
        str,
        typer.Option(
            help="How steps are carried out: eager, compile, graph (one CUDA graph), or auto: graph on a GPU.",
            rich_help_panel=RUNNING,
        ),
    ] = "auto",
    images: Annotated[
        str,
        typer.Option(
            help="Training images: memory, stream (decoded from the disk at each step), or auto: as they fit.",
            rich_help_panel=RUNNING,
        ),
    ] = "auto",
    microbatch: Annotated[
        int | None,
        typer.Option(
            help="Images at a time in the image tower: less memory, the same result. 0: all at once.",
            rich_help_panel=RUNNING,
            show_default="some on a CPU, all on a GPU",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the stopped run in RUN.", rich_help_panel=RUNNING)
    ] = False,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.", rich_help_panel=RUNNING)] = 60.0,
    checkpoint_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints, besides the seconds.", rich_help_panel=RUNNING, show_default="none"),
    ] = None,
) -> None:
    """Adapt a model to DATA and write adapter, metrics and report.html to RUN. The defaults are CLIP-LoRA's recipe."""
    lora = valid(
        lambda: LoRAConfig(
            rank=rank, alpha=alpha, dropout=dropout, targets=_names(targets), encoders=_names(encoders),
            layers=_layers(layers), scaling=scaling, rank_pattern=_ranks(rank_pattern),
        )
    )  # fmt: skip
    from ..fewshot import datasets

    reading = valid(lambda: Reading(class_names, image_column, label_column, split_column, validation))
    recipe = valid(
        lambda: Recipe(
            model=model, pretrained=_pretrained(model, pretrained), quick_gelu=quick_gelu, method=method, shots=shots,
            iterations=iterations, batch_size=batch_size, lr=lr, lr_min=lr_min, weight_decay=weight_decay, betas=betas,
            template=one_or_all(datasets.prompts(template)) if template else None,
            crop_scale=crop_scale, flip=flip, max_side=max_side, seed=seed, kl_weight=kl_weight,
            kl_temperature=kl_temperature, lr_ratio=lr_ratio, average=average, share_prefix=share_prefix,
            base_to_new=base_to_new, precision=precision, lora=lora, reading=reading,
        )
    )  # fmt: skip
    from ..fewshot.runfolder import RunFolder, identity

    # the trainer checks all of it again; here nothing heavy is loaded yet
    RunFolder(out).check(identity(recipe, data), resume)
    for name in (data, *(also or ())):
        datasets.find(name, root)
    from ..fewshot import trainer

    again = shlex.join(["fastlora", *sys.argv[1:], *([] if resume else ["--resume"])])
    often = checkpoint_seconds, checkpoint_steps
    where = root, device, resume, *often, again, engine, images, microbatch
    job = valid(lambda: trainer.Job(recipe, data, out, *where, also=tuple(also or ())))
    trainer.run(job, console())


def _names(text: str) -> tuple[str, ...]:
    """ "q,k v" -> ("q", "k", "v")."""
    return tuple(text.replace(",", " ").split())


def _layers(text: str) -> str | tuple[int, ...]:
    parts = _names(text)
    if parts and all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    return text


def _ranks(text: str) -> dict[str | int, int]:
    """ "0=8,visual.*=4" -> {0: 8, "visual.*": 4}."""
    ranks: dict[str | int, int] = {}
    for part in _names(text):
        key, equals, rank = part.rpartition("=")
        if not equals or not key or not rank.isdecimal():
            raise ValueError(f"--rank-pattern takes block=rank or pattern=rank, with commas, got {part!r}")
        ranks[int(key) if key.isdecimal() else key] = int(rank)
    return ranks


def _pretrained(model: str, pretrained: str) -> str | None:
    """mini has weights of its own; other models take a tag, a file, or none."""
    if model == "mini":
        if pretrained not in ("openai", "none"):
            raise ValueError(f"--pretrained {pretrained} does not go with --model mini, which has weights of its own")
        return None
    return None if pretrained == "none" else pretrained
