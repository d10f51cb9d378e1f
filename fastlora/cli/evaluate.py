"""`fastlora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..fewshot.errors import UserError
from ..fewshot.recipe import templates
from .app import DATA_HELP, DEVICE_HELP, app, console, valid

__all__ = ["evaluate"]


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json, predictions.csv, report.html.", show_default="none written"),
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="The prompt; several are averaged.", show_default="the run's")
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    root: Annotated[Path, typer.Option(help="Folder that holds the known sets.")] = Path("data"),
) -> None:
    """Test the model that RUN adapted on DATA: its test images, or in a plain folder all that RUN did not train on."""
    from ..fewshot.runfolder import RunFolder

    prompts = valid(lambda: templates(template)) if template else None
    folder = RunFolder(run)
    folder.read_config()
    if out is not None and RunFolder(out).metrics.exists():
        raise UserError(f"--out {out} holds another result: choose another folder")
    from ..fewshot import evalrun

    evalrun.run(folder, data, root, device, out, prompts, console())
