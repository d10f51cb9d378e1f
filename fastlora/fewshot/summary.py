"""What came out of a run: metrics.json, history.csv, tables for the terminal."""

from __future__ import annotations

import csv
import dataclasses
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .halves import harmonic_mean
from .recipe import Recipe
from .result import Result

__all__ = ["base_to_new", "environment", "measures", "other", "print_result", "write_history"]

# A larger matrix would make the file unreadable; predictions.csv has every prediction anyway.
LARGEST_MATRIX = 200
LONGEST_TABLE = 25


def measures(before: Result, after: Result) -> dict[str, Any]:
    """Accuracies in percent, overall and per class, calibration, and what was confused with what."""
    top5 = {"top5_accuracy": round(after.top(5), 4), "zero_shot_top5_accuracy": round(before.top(5), 4)}
    rows = zip(before.per_class(), after.per_class(), strict=True)
    return {
        "accuracy": round(after.accuracy, 4),
        "zero_shot_accuracy": round(before.accuracy, 4),
        "test_images": len(after.labels),
        **(top5 if len(after.classes) > 5 else {}),
        "mean_of_classes": round(after.mean_of_classes, 4),
        "zero_shot_mean_of_classes": round(before.mean_of_classes, 4),
        "calibration": {
            "ece": round(after.calibration_error, 4),
            "zero_shot_ece": round(before.calibration_error, 4),
            "bins": [dataclasses.asdict(b) for b in after.bins()],
        },
        "per_class": [
            {"class": name, "images": count, "zero_shot": zero_shot, "accuracy": accuracy}
            for (name, count, zero_shot), (_, _, accuracy) in rows
        ],
        "most_confused": [{"class": true, "predicted": guess, "images": count} for true, guess, count in after.most_confused()],
        "confusion": after.confusion().tolist() if len(after.classes) <= LARGEST_MATRIX else None,
    }


def base_to_new(base: tuple[Result, Result], new: tuple[Result, Result]) -> dict[str, Any]:
    """Accuracies in percent on both halves of the classes and their harmonic mean; each half is (before, after)."""

    def row(on_base: float, on_new: float) -> dict[str, float]:
        values = {"base": on_base, "new": on_new, "harmonic_mean": harmonic_mean(on_base, on_new)}
        return {name: round(value, 4) for name, value in values.items()}

    (base_before, base_after), (new_before, new_after) = base, new
    counts = {"base_classes": len(base_after.classes), "new_classes": len(new_after.classes)}
    zero_shot = row(base_before.accuracy, new_before.accuracy)
    images = {"new_test_images": len(new_after.labels)}
    return {**row(base_after.accuracy, new_after.accuracy), "zero_shot": zero_shot, **counts, **images}


def other(data: str, before: Result, after: Result) -> dict[str, Any]:
    """Accuracy in percent on another data set, before and after."""
    values = {"zero_shot": before.accuracy, "accuracy": after.accuracy, "change": after.accuracy - before.accuracy}
    rounded = {name: round(value, 4) for name, value in values.items()}
    return {"data": data, "classes": len(after.classes), "test_images": len(after.labels), **rounded}


def environment(device: torch.device, dtype: torch.dtype | None) -> dict[str, str]:
    """Versions, device and precision of a run."""
    versions = {name: package_version(name) for name in ("torch", "open_clip_torch", "triton")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    precision = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
    return {"python": platform.python_version(), "fastlora": own_version(), **versions, "device": name, "precision": precision}


def own_version() -> str:
    """The version of this library, as it is installed."""
    return package_version("fastlora-clip")


def package_version(name: str) -> str:
    """The version of an installed package, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def write_history(path: Path, history: torch.Tensor, recipe: Recipe) -> None:
    """One line a step: number, loss, share of right answers in the batch, learning rate."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "loss", "accuracy", "lr"))
        for step, (loss, accuracy) in enumerate(history.tolist()):
            writer.writerow((step + 1, repr(loss), repr(accuracy), repr(recipe.lr_at(step))))


def print_result(metrics: dict[str, Any], console: Console) -> None:
    """The per-class table (the weakest classes where there are many), confusions and accuracies."""
    rows = sorted((row for row in metrics["per_class"] if row["images"]), key=lambda row: row["accuracy"])
    title = f"the {LONGEST_TABLE} weakest of {len(rows)} classes" if len(rows) > LONGEST_TABLE else "per class"
    table = Table("class", "images", "zero-shot %", "accuracy %", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows[:LONGEST_TABLE]:
        table.add_row(row["class"], str(row["images"]), f"{row['zero_shot']:.1f}", f"{row['accuracy']:.1f}")
    console.print(table)
    if metrics["most_confused"]:
        worst = metrics["most_confused"][:5]
        pairs = ", ".join(f"{row['class']} taken for {row['predicted']} ({row['images']})" for row in worst)
        console.print(f"most confused: {pairs}", highlight=False)
    for note in metrics.get("notes", ()):
        console.print(f"note: {note}", highlight=False, markup=False)
    for row in metrics.get("also", ()):
        console.print(f"{row['data']}: {row['zero_shot']:.2f} % before, {row['accuracy']:.2f} % after", highlight=False)
    if halves := metrics.get("base_to_new"):
        console.print(
            f"base {halves['base']:.2f} %, new {halves['new']:.2f} %, harmonic mean {halves['harmonic_mean']:.2f} %"
            f" (zero-shot {halves['zero_shot']['harmonic_mean']:.2f} %)"
        )
    top5 = f"top-5 {metrics['top5_accuracy']:.2f} %, " if "top5_accuracy" in metrics else ""
    ece = metrics["calibration"]["ece"]
    console.print(
        f"{top5}mean of the classes {metrics['mean_of_classes']:.2f} %, calibration error {ece:.2f} %", highlight=False
    )
    console.print(
        f"[bold]accuracy: {metrics['accuracy']:.2f} %[/bold] of {metrics['test_images']} test images"
        f" (zero-shot {metrics['zero_shot_accuracy']:.2f} %)"
    )
