"""The command line's root, and what its commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from ..fewshot.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DATA_HELP", "DEVICE_HELP", "app", "console", "valid"]

app = typer.Typer(
    name="fastlora",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",  # gives --help its panels
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")
DATA_HELP = (
    "A folder with one sub-folder a class (or train/ and test/ of such), a table (.csv, .tsv, .parquet) with a column path and"
    " a column label, a known set (fastlora data lists them), or digits."
)
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
