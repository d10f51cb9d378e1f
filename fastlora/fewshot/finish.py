"""What a run leaves in its folder: what was trained, history, predictions, report, and metrics.json last."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.console import Console

from .. import checkpoint as adapters
from ..checkpoint.files import write_safetensors
from . import memory, report, summary
from .job import NEW, TEST, Job
from .loop import Loop
from .methods import coop
from .models import LoadedModel
from .prepare import Prepared
from .recipe import one_or_all
from .result import Result
from .runfolder import RunFolder, atomic, write_json

__all__ = ["finish", "save"]


def save(loaded: LoadedModel, context: coop.ContextEmbedding | None, folder: RunFolder, job: Job) -> None:
    """Write what was trained."""
    if job.recipe.method == "lora":
        adapters.save(loaded.model, folder.adapter, tokenizer=loaded.tokenizer)
    elif context is not None:
        with atomic(folder.context) as temporary:
            coop.save(context, temporary)
    elif not job.brief:
        write_safetensors(folder.model, loaded.model.state_dict(), loaded.network.metadata())


def finish(job: Job, folder: RunFolder, data: Prepared, all_before: dict[str, Result], all_after: dict[str, Result],
            loop: Loop | None, details: dict[str, Any], timings: dict[str, float], device: torch.device,
            dtype: torch.dtype | None, console: Console) -> dict[str, Any]:  # fmt: skip
    """Write everything but the adapter; metrics.json last, because it marks the run as finished."""
    recipe = job.recipe
    before, after = all_before[TEST], all_after[TEST]
    metrics = {"method": recipe.method, "train_images": len(data.shots.train), **summary.measures(before, after)}
    metrics["resolved"] = {
        "iterations": recipe.steps, "lr": recipe.learning_rate, "template": one_or_all(data.templates), "flip": data.flip
    }  # fmt: skip
    if recipe.base_to_new:
        metrics["base_to_new"] = summary.base_to_new((before, after), (all_before[NEW], all_after[NEW]))
    if job.also:
        metrics["also"] = [summary.other(name, all_before[name], all_after[name]) for name in job.also]
    if loop is not None:
        metrics["training"] = {
            "steps": loop.step,
            "seconds": round(loop.seconds, 3),
            "engine": loop.engine,
            "microbatch": loop.microbatch,
            "steps_per_second": loop.step / max(loop.seconds, 1e-9),
            "final_loss": float(loop.history[-1, 0]),
            "trainable_parameters": details.pop("trainable_parameters"),
        }
        with atomic(folder.history) as temporary:
            summary.write_history(temporary, loop.history, recipe)
    metrics |= details
    metrics["memory"] = memory.peak(device)
    metrics["timings"] = {name: round(seconds, 3) for name, seconds in timings.items()}
    metrics["notes"] = data.notes()
    metrics["environment"] = summary.environment(device, dtype)
    tested = [item.name for item in data.test.items]
    with atomic(folder.predictions) as temporary:
        after.write_csv(temporary, tested)
    if not job.brief:
        config = json.loads(folder.config.read_text(encoding="utf-8"))
        with atomic(folder.report) as temporary:
            history = None if loop is None else loop.history
            report.write(temporary, config, metrics, before, after, data.test.items, history)
    write_json(folder.metrics, metrics)
    folder.checkpoint.unlink(missing_ok=True)
    summary.print_result(metrics, console)
    if not job.brief:
        console.print(f"report: {folder.report.resolve()}", soft_wrap=True, highlight=False)
    return metrics
