"""`fastlora eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..fewshot.reading import Reading
from ..fewshot.recipe import OWN, one_or_all, templates
from .app import DATA_HELP, DEVICE_HELP, ClassNames, ImageColumn, LabelColumn, Root, SplitColumn, app, console, valid

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
        list[str] | None,
        typer.Option(help="The prompt, a file of them, or own; several are averaged.", show_default="the run's"),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    root: Root = Path("data"),
) -> None:
    """Test the model that RUN adapted on DATA: its test images, or all where none are set apart, but none that RUN trained on.

    RUN's own data are read as RUN read them, unless an option of the panel Data is given.
    """
    from ..fewshot import datasets
    from ..fewshot.runfolder import RunFolder

    prompts = one_or_all(datasets.prompts(template)) if template else None
    if prompts is not None and prompts != OWN:
        valid(lambda: templates(prompts))
    reading = valid(lambda: Reading(class_names, image_column, label_column, split_column))
    folder = RunFolder(run)
    folder.read_config()
    if out is not None:
        RunFolder(out).check_empty()
    datasets.find(data, root)
    from ..fewshot import evalrun

    how = None if reading == Reading() else reading
    evalrun.run(folder, data, root, device, out, prompts, console(), how)
