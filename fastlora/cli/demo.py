"""`fastlora demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console

__all__ = ["demo"]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for the run; a demo there before is replaced.")] = Path(
        "fastlora-demo"
    ),
    iterations: Annotated[int, typer.Option(help="Optimizer steps; the paper's recipe has 8000 for 16 shots.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the images drawn, their order and crops, the adapters, dropout.")] = 1,
) -> None:
    """Adapt the mini CLIP to handwritten digits, 16 of each, in at most three minutes on two cores."""
    from ..fewshot import demo

    demo.run(out, iterations, seed, console())
