"""`fastlora data`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ..fewshot.reading import Reading
from .app import DATA_HELP, ClassNames, ImageColumn, LabelColumn, Root, SplitColumn, Validation, app, console, valid

if TYPE_CHECKING:
    from rich.console import Console

    from ..fewshot.datasets import Dataset, Item

__all__ = ["data"]


@app.command()
def data(
    name: Annotated[str | None, typer.Argument(metavar="DATA", help=DATA_HELP, show_default="the paper's sets")] = None,
    class_names: ClassNames = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    validation: Validation = Reading.validation,
    root: Root = Path("data"),
) -> None:
    """What DATA holds, and whether it can be trained on; without DATA the paper's sets, and what to put where."""
    how = valid(lambda: Reading(class_names, image_column, label_column, split_column, validation))
    if name is None:
        _known(root, console())
        return
    from ..fewshot import datasets

    found = datasets.find(name, root)
    dataset = datasets.load(name, root, how)
    datasets.check_training(dataset)
    _about(name, found.kind, dataset, console())


def _about(name: str, kind: str, dataset: Dataset, out: Console) -> None:
    """The data set's classes, with the images of each, and what was left out."""
    from rich.table import Table

    table = Table("class", "train", "val", "test")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = [_counted(items) for items in (dataset.train, dataset.val, dataset.test)]
    for label, word in enumerate(dataset.classes):
        table.add_row(escape(word), *(f"{count[label]:,}" if count is not None else "the rest" for count in counts))
    out.print(f"{escape(name)}: {escape(kind)}, {len(dataset.classes)} classes", highlight=False, soft_wrap=True)
    out.print(table)
    sums = [f"{len(dataset.train):,} to train on", f"{len(dataset.val):,} for validation"]
    sums.append("what the shots leave for the test" if dataset.test is None else f"{len(dataset.test):,} for the test")
    out.print(", ".join(sums), highlight=False)
    out.print(escape(f'prompt: "{dataset.template}"'), highlight=False)
    for note in dataset.notes:
        out.print(escape(note), highlight=False, soft_wrap=True)


def _counted(items: tuple[Item, ...] | None) -> Counter[int] | None:
    return None if items is None else Counter(item.label for item in items)


def _known(root: Path, out: Console) -> None:
    """The paper's sets."""
    from rich.table import Table

    from ..fewshot.datasets import KNOWN, locate

    table = Table("DATA", "classes", "train / val / test", "here")
    table.columns[1].justify = table.columns[2].justify = "right"
    missing: dict[str, tuple[str, ...]] = {}
    for name, known in KNOWN.items():
        found = locate(name, root)
        if found.missing:
            missing[name] = found.missing
        sizes = " / ".join(f"{size:,}" if size else "–" for size in known.sizes)
        table.add_row(name, f"{known.classes:,}", sizes, f"not complete in {root}" if found.missing else str(found.place))
    out.print(table)
    for name, pieces in missing.items():
        out.print(f"[bold]{name}[/bold]: {'; '.join(pieces)}", soft_wrap=True, highlight=False)
    out.print(
        "digits comes with scikit-learn; folders, tables and tars are named by their path, sets of libraries as hf:NAME and"
        " torchvision:NAME",
        soft_wrap=True,
    )
