"""Rows as benchmarks write them: JSON lines, each file with a header (machine, versions, commit, date) and its ceilings."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..fewshot.errors import UserError

__all__ = [
    "FLOOR",
    "MODEL",
    "OURS",
    "PAPER",
    "PREFIX",
    "WHY_NOT",
    "Row",
    "fit",
    "latest",
    "median",
    "over",
    "pick",
    "read",
    "shares",
    "spread",
    "step_ratios",
]

Row = dict[str, Any]
FLOOR, OURS, PREFIX, PAPER = "frozen", "fastlora", "fastlora, share_prefix", "the paper's arithmetic"
MODEL = "ViT-B-32-quickgelu"  # the one that targets and README speak of: OpenAI's ViT-B/32, as the paper's code loads it

# What a row has instead of a time: its contestant was wrong, cannot run there, or failed.
WHY_NOT = frozenset(("refused", "skipped", "failed"))


def read(path: Path) -> list[Row]:
    """The rows of a .jsonl file, or of all below a folder, each with its file's header under "env" and ceilings under "limits".

    Rows without a time are of the kind "not timed", whatever was to be timed. "gemm_flops" is the machine's GEMM speed, the
    median over the files: each was measured within a second, which another program may have spoilt.

    Raises:
        UserError: nothing there, or a line that is no row.
    """
    if not path.exists():
        raise UserError(f"ROWS {path} does not exist: give a .jsonl file or a folder of them, as `make bench` writes")
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"ROWS {path} holds no .jsonl file")
    rows = [row for file in files for row in _read(file)]
    speeds: dict[str, dict[str, float]] = {}
    for row in rows:
        if "flops" in row["limits"]:
            speeds.setdefault(_machine(row), {})[row["file"]] = row["limits"]["flops"]
    for row in rows:
        if found := speeds.get(_machine(row)):
            row["gemm_flops"] = statistics.median(found.values())
    return rows


def _machine(row: Row) -> str:
    """What a GEMM speed belongs to."""
    return " ".join(str(row["env"].get(key)) for key in ("cpu", "gpu", "threads")) + str(row["limits"].get("dtype"))


def _read(file: Path) -> list[Row]:
    rows: list[Row] = []
    env: Row = {}
    limits: Row = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number} is not a JSON object: not a file of benchmark rows")
        kind = row.get("row")
        if kind == "run":
            env = row
        elif kind == "ceilings":
            limits = row
        elif kind is not None:
            if not WHY_NOT.isdisjoint(row):
                row["row"] = "not timed"
            rows.append(row | {"env": env, "limits": limits, "file": file.name})
    return rows


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose values are these."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def latest(rows: list[Row], *keys: str) -> list[Row]:
    """Of rows with the same keys and the same run number only the one measured last."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: str(row["env"].get("date", ""))):
        found[(*(row.get(key) for key in keys), row.get("run"))] = row
    return list(found.values())


def median(rows: Iterable[Row], value: Callable[[Row], float | None] | str) -> float | None:
    """The median over rows (whole runs) of one value; None where no row has it."""
    read_value = value if callable(value) else (lambda row: row.get(value))
    values = [found for row in rows if (found := read_value(row)) is not None]
    return statistics.median(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """The largest distance of a value from their median, as a share of it; None for fewer than two."""
    if len(values) < 2:
        return None
    middle = statistics.median(values)
    return max(abs(value - middle) for value in values) / middle


def step_ratios(mine: Row, base: Row) -> list[float]:
    """Of one run the ratio of each timed step to the one beside it, where rows keep single steps; else that of the medians."""
    steps = [row.get("all_ms", []) for row in (mine, base)]
    if steps[0] and len(steps[0]) == len(steps[1]):
        return [a / b for a, b in zip(*steps, strict=True)]
    return [mine["median_ms"] / base["median_ms"]]


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """(factor, exponent) of y = factor · x^exponent by least squares in logarithms; two points or more, all positive."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    slope, offset = statistics.linear_regression(*zip(*logs, strict=True))
    return math.exp(offset), slope


def over(rows: list[Row], name: str, base: str) -> list[float]:
    """Of each run the time of one contestant over another's, both from one file; of a single run that of each step."""
    mine, theirs = ({(r.get("run"), r["file"]): r for r in pick(rows, contestant=n)} for n in (name, base))
    pairs = [(mine[key], theirs[key]) for key in mine if key in theirs]
    if len(pairs) == 1:
        return step_ratios(*pairs[0])
    return [a["median_ms"] / b["median_ms"] for a, b in pairs]


def shares(rows: list[Row], name: str) -> list[float]:
    """Of each run a step's share of the machine's GEMM speed; FLOPs are counted in one run and the same in all."""
    mine = pick(rows, contestant=name)
    flops = median(mine, "flops")
    timed = [row for row in mine if "median_ms" in row and "gemm_flops" in row]
    return [flops / (row["median_ms"] / 1e3) / row["gemm_flops"] for row in timed] if flops else []
