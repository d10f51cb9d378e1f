"""`fastlora merge`: the model that a run adapted, as a checkpoint of the plain host."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ..checkpoint import merged
from . import models
from .errors import UserError
from .evalrun import adapt, finished
from .runfolder import RunFolder

__all__ = ["run"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(folder: RunFolder, out: Path, dtype: str, console: Console) -> None:
    """Write the merged model of `folder`, a finished run by LoRA, to `out`, whole or not at all.

    Args:
        dtype: "fp32", "fp16" or "bf16".

    Raises:
        UserError: a run of another method or not finished, or an `out` that cannot be written.
    """
    _, recipe = finished(folder)
    if recipe.method != "lora":
        raise UserError(f"the run in {folder.path} was trained by {recipe.method}: there is no adapter to merge")
    if out.exists():
        raise UserError(f"--out {out} is there already: choose another name")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    models.check(recipe.model, recipe.pretrained)
    model = models.load(recipe.model, recipe.pretrained, torch.device("cpu")).model
    adapt(model, recipe, folder)
    report = merged.write(model, out, DTYPES[dtype])
    console.print(str(report), soft_wrap=True, highlight=False)
    console.print(f"checkpoint: {out.resolve()}", soft_wrap=True, highlight=False)
