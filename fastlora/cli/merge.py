"""`fastlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console

__all__ = ["merge"]


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="A folder to make; or a file of weights alone: NAME.safetensors, or NAME.pt, .pth, .bin."
        ),
    ],
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, fp16 or bf16.")] = "fp32",
    form: Annotated[
        str | None,
        typer.Option(help="Of the folder: open_clip or transformers.", show_default="both, where both can hold the model"),
    ] = None,
) -> None:
    """Write the model that RUN adapted as a plain checkpoint, which needs nothing of fastlora, and print how to load it.

    DIR loads by itself in open_clip and in transformers: beside the weights it holds the activation, the preprocessing, the
    tokenizer, the class names and the prompt. The update is added in fp32; what rounding to another dtype costs is said.
    """
    from ..fewshot import mergerun
    from ..fewshot.runfolder import RunFolder

    mergerun.run(RunFolder(run), out, dtype, console(), form)
