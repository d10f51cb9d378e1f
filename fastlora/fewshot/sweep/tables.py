"""Tables of a sweep: accuracy by variant and shots, by data set, and by the options that differ; the paper's figures beside."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Table", "cell", "markdown", "paper", "series", "source", "tables"]

PAPER = Path(__file__).parent / "paper.json"
# Columns of the paper's tables; its other backbones are in paper.json too.
PAPER_BACKBONE = "ViT-B-16"
Row = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Table:
    """A caption, column heads, and rows of text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def paper(model: str = PAPER_BACKBONE) -> dict[int, dict[str, float]]:
    """The paper's accuracies in percent by shots and data set; of ViT-B/16 for models that it did not run."""
    accuracy = json.loads(PAPER.read_text(encoding="utf-8"))["accuracy"]
    return {int(shots): row for shots, row in accuracy.get(paper_model(model), {}).items()}


def source() -> str:
    """Where the paper's figures are from."""
    return json.loads(PAPER.read_text(encoding="utf-8"))["source"]


def paper_model(model: str) -> str:
    """The backbone of the paper that is shown beside `model`."""
    name = model.replace("/", "-")
    return name if name in json.loads(PAPER.read_text(encoding="utf-8"))["accuracy"] else PAPER_BACKBONE


def cell(values: Sequence[float], expected: int) -> str:
    """Mean ± standard deviation over seeds; a number of seeds other than expected is said."""
    if not values:
        return "not run"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    missing = f" ({len(values)} of {expected} seeds)" if len(values) < expected else ""
    return f"{statistics.mean(values):.1f}{spread}{missing}"


def series(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Rows by key, in order of first appearance."""
    groups: dict[Any, list[T]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def tables(rows: Sequence[Row]) -> list[Table]:
    """Every table that these rows fill."""
    made = []
    plain = [row for row in rows if not row["axes"]]
    ablated = [row for row in rows if row["axes"]]
    if plain:
        made.append(by_data(plain) if len(series(plain, lambda r: r["data"])) > 2 else by_shots(plain))
    for variant, group in series(ablated, lambda r: r["variant"] if r["variant"] != _label(r) else "").items():
        made.append(by_axes(variant, group))
    return made


def by_shots(rows: Sequence[Row], published: bool = True) -> Table:
    """One row a data set and variant, one column a number of shots; zero-shot first, the paper's (if `published`) last."""
    shots = sorted({row["shots"] for row in rows if row["method"] != "zero-shot"}) or [0]
    seeds = _seeds(rows)
    lines = []
    for data, of_data in series(rows, lambda r: r["data"]).items():
        zero = f"{of_data[0]['zero_shot_accuracy']:.1f}"
        lines.append((data_name(of_data), "zero-shot", *[zero] * len(shots)))
        for variant, group in series(of_data, lambda r: r["variant"]).items():
            if group[0]["method"] == "zero-shot":
                continue
            cells = [cell([row["accuracy"] for row in group if row["shots"] == count], seeds) for count in shots]
            lines.append((data_name(of_data), variant, *cells))
        theirs = paper(of_data[0]["model"])
        if published and data in theirs[0]:
            model = paper_model(of_data[0]["model"])
            cells = [f"{theirs[count][data]:.1f}" if count in theirs else "" for count in shots]
            lines.append((data, f"the paper, {model}", *cells))
    heads = tuple(f"{count} shot{'s' * (count > 1)}" for count in shots)
    return Table(_title(rows), ("data", "method", *heads), tuple(lines))


def by_data(rows: Sequence[Row]) -> Table:
    """The paper's table: one row a number of shots and variant, one column a data set, and the mean."""
    of_data = series(rows, lambda r: r["data"])
    seeds, model = _seeds(rows), rows[0]["model"]
    published = paper(model)
    names = [data_name(group) for group in of_data.values()]
    zero = [group[0]["zero_shot_accuracy"] for group in of_data.values()]
    lines = [("0", "zero-shot", *[f"{value:.1f}" for value in zero], f"{statistics.mean(zero):.1f}")]
    lines += _published(published, 0, list(of_data), paper_model(model))
    for count, of_shots in sorted(series([r for r in rows if r["method"] != "zero-shot"], lambda r: r["shots"]).items()):
        for variant, group in series(of_shots, lambda r: r["variant"]).items():
            values = [[row["accuracy"] for row in group if row["data"] == data] for data in of_data]
            mean = f"{statistics.mean(statistics.mean(v) for v in values):.1f}" if all(values) else ""
            lines.append((str(count), variant, *[cell(v, seeds) for v in values], mean))
        lines += _published(published, count, list(of_data), paper_model(model))
    return Table(_title(rows), ("shots", "method", *names, "mean"), tuple(lines))


def by_axes(variant: str, rows: Sequence[Row]) -> Table:
    """One row for each choice of the options that differ, one column a data set and number of shots."""
    columns = series(rows, lambda r: (r["data"], r["shots"]))
    axes = list(dict.fromkeys(name for row in rows for name in row["axes"]))
    seeds = _seeds(rows)
    lines = []
    for choice, group in series(rows, lambda r: tuple(r["axes"].get(name, "") for name in axes)).items():
        cells = []
        for data, count in columns:
            cells.append(cell([row["accuracy"] for row in group if (row["data"], row["shots"]) == (data, count)], seeds))
        trainable = group[0].get("trainable_parameters")
        lines.append((*choice, f"{trainable:,}" if trainable else "", *cells))
    heads = [f"{data_name(group)}, {count} shot{'s' * (count > 1)}" for (_, count), group in columns.items()]
    title = f"{variant}: {_title(rows)}" if variant else _title(rows)
    return Table(title, (*axes, "parameters", *heads), tuple(lines))


def data_name(rows: Sequence[Row]) -> str:
    """The data set's name, marked where its images are generated."""
    return f"{rows[0]['data']} (generated)" if rows[0]["generated"] else rows[0]["data"]


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(table.heads)} |", "|" + "---|" * len(table.heads)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in table.rows])


def _published(published: dict[int, dict[str, float]], count: int, names: list[str], model: str) -> list[tuple[str, ...]]:
    row = published.get(count, {})
    values = [row.get(name) for name in names]
    if not any(value is not None for value in values):
        return []
    known = [value for value in values if value is not None]
    mean = f"{statistics.mean(known):.1f}" if len(known) == len(values) else ""
    return [(str(count), f"the paper, {model}", *["" if v is None else f"{v:.1f}" for v in values], mean)]


def _seeds(rows: Sequence[Row]) -> int:
    return len({row["seed"] for row in rows})


def _label(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["axes"].items())


def _title(rows: Sequence[Row]) -> str:
    models, seeds = (sorted({str(row[name]) for row in rows}) for name in ("model", "seed"))
    return f"top-1 accuracy in percent, {', '.join(models)}, mean ± standard deviation of seeds {', '.join(seeds)}"
