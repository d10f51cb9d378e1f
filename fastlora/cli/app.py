"""The command line's root, and what its commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..fewshot.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "DATA_HELP", "DEVICE_HELP", "ClassNames", "ImageColumn", "LabelColumn", "Root", "SplitColumn", "Validation", "app",
    "console", "valid",
]  # fmt: skip

app = typer.Typer(
    name="fastlora",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # gives --help its panels
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")
DATA_HELP = (
    "A path: a folder with one sub-folder a class (or train/ and test/ of such), a table (.csv, .tsv, .parquet) with columns"
    " path and label, WebDataset tars (a file, a folder of them, or as train-{000..009}.tar), a saved Hugging Face set. Or a"
    " name: hf:NAME (on the hub, or hf:NAME:CONFIGURATION), torchvision:NAME, a set of the paper (fastlora data lists"
    " them), digits."
)
PANEL = "Data"
# What train, eval and data say alike about how DATA is read.
ClassNames = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Class names, one a line in the order of the labels, or lines of label, tab, name.",
        rich_help_panel=PANEL,
        show_default="the data's own",
    ),
]


def _column(what: str, usual: str) -> Any:
    help = f"Column (of WebDataset: ending, or key of .json) with {what}."
    return typer.Option(metavar="NAME", help=help, rich_help_panel=PANEL, show_default=usual)


ImageColumn = Annotated[str | None, _column("the image or its path", "path, image, …")]
LabelColumn = Annotated[str | None, _column("the label", "label, class, …; cls")]
SplitColumn = Annotated[str | None, _column("train, val or test", "split, … if there is one")]
Validation = Annotated[
    float,
    typer.Option(help="Share of the training images held out where there is no validation split.", rich_help_panel=PANEL),
]
Root = Annotated[Path, typer.Option(help="Folder that holds the known sets and torchvision's.", rich_help_panel=PANEL)]
DEVICE_HELP = "auto (the GPU where there is one), cpu, cuda, cuda:1, …"


@app.callback(invoke_without_command=True)
def root_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Adapt CLIP to your images by LoRA, from a few labelled ones per class."""
    if version:
        from .. import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def console() -> Console:
    """The terminal's; elsewhere lines of 120 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def valid(make: Callable[[], T]) -> T:
    """What `make` makes; a ValueError of its own checks becomes the user's."""
    try:
        return make()
    except ValueError as error:
        raise UserError(str(error)) from error
