"""`fastlora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..fewshot.errors import UserError
from .app import app, console

__all__ = ["merge"]

DTYPES = ("fp32", "fp16", "bf16")


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The checkpoint: NAME.safetensors, or NAME.pt for torch's own format.")
    ],
    dtype: Annotated[str, typer.Option(help=f"Of the weights in FILE: {', '.join(DTYPES)}.")] = "fp32",
) -> None:
    """Write the model that RUN adapted as a plain checkpoint, which needs nothing of fastlora.

    For an open_clip model that is what open_clip's create_model(NAME, pretrained=FILE) takes. The adapter is added to the
    weights in fp32, and what rounding them to another dtype costs is said.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    from ..fewshot import mergerun
    from ..fewshot.runfolder import RunFolder

    mergerun.run(RunFolder(run), out, dtype, console())
