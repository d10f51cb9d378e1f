"""One row a run (and variant it stands in), from its metrics.json: run folders are the truth, rows.* follow them.

So a row is there exactly once, whenever and however often a sweep was stopped.
"""

from __future__ import annotations

import csv
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..runfolder import RunFolder, atomic
from .grid import Run

__all__ = ["check_place", "read_rows", "row_of", "write_rows"]

# Parts of metrics.json that are no figures of one run, or that the recipe says already.
LEFT_OUT = ("method", "resolved")
# What a sweep writes beside its runs, and what grid.Run.name makes of a run.
OF_A_SWEEP = re.compile(r"rows\.(jsonl|csv|parquet)|index\.html|shots\.png|options-[0-9]+\.png")
OF_A_RUN = re.compile(r".*-[0-9]+shots-seed-?[0-9]+-[0-9a-f]{8}")


def row_of(run: Run, out: Path) -> dict[str, Any] | None:
    """The row of a run below `out`, or None until it is finished.

    Holds the data set, variant, method, shots and seed; the options of the recipe; every figure of metrics.json; versions,
    device and the day it was finished.
    """
    metrics_file = RunFolder(out / run.name).metrics
    try:
        metrics = json.loads(metrics_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    recipe = run.recipe.to_dict()
    options = {**{k: v for k, v in recipe.items() if k not in ("lora", "reading")}, **recipe["lora"], **recipe["reading"]}
    row: dict[str, Any] = {"data": run.data, "variant": run.variant or run.label, "axes": dict(run.axes)}
    row |= {name: options.pop(name) for name in ("method", "shots", "seed")}
    row |= {name: value for name, value in metrics.items() if name not in LEFT_OUT and _plain(value)}
    row |= {name: value for name, value in metrics.get("training", {}).items() if name != "seconds" and _plain(value)}
    for group in ("base_to_new", "calibration"):  # base_to_new_harmonic_mean, calibration_ece, …
        row |= {f"{group}_{name}": value for name, value in metrics.get(group, {}).items() if _plain(value)}
    row["train_seconds"] = metrics.get("training", {}).get("seconds", 0.0)
    row["seconds"] = round(sum(metrics.get("timings", {}).values()), 3)
    row["generated"] = any("generated images" in note for note in metrics.get("notes", ()))
    row["memory"] = max(metrics.get("memory", {}).values(), default=None)  # bytes; of the process, or of the GPU
    row |= {name: _text(value) for name, value in options.items()}
    row["date"] = datetime.date.fromtimestamp(metrics_file.stat().st_mtime).isoformat()
    return row | metrics.get("environment", {}) | {"run": run.name}


def check_place(out: Path) -> None:
    """Raise UserError if a sweep in `out` would overwrite files that no sweep wrote."""
    there = sorted(path.name for path in out.iterdir() if OF_A_SWEEP.fullmatch(path.name))
    if there and not any(OF_A_RUN.fullmatch(path.parent.name) for path in out.glob("*/config.json")):
        raise UserError(f"--out {out} holds {', '.join(there)}, but no run of a sweep: choose another folder")


def write_rows(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    """rows.jsonl, rows.csv and, where pyarrow is installed, rows.parquet in `out`, each whole or not at all."""
    with atomic(out / "rows.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    flat = [{name: json.dumps(v) if isinstance(v := row.get(name), dict) else v for name in columns} for row in rows]
    with atomic(out / "rows.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(flat)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    with atomic(out / "rows.parquet") as temporary:
        parquet.write_table(pyarrow.Table.from_pylist(flat), temporary)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_rows` wrote as JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or value is None


def _text(value: Any) -> Any:
    """Tuples as "q,k,v"; what JSON has as plain values stays."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
