"""The folder of a run: what lies where, files written whole or not at all, and whose run it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..checkpoint.files import atomic, leftovers
from .errors import UserError
from .lock import check_free, owned
from .recipe import Recipe

__all__ = ["RunFolder", "atomic", "identity", "write_json"]

# A run leaves a few MiB; full fine-tuning checks again once the size of the model is known.
LEAST_SPACE = 64 << 20


def write_json(path: Path, values: Any) -> None:
    """Values as indented JSON, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def identity(recipe: Recipe, data: str) -> dict[str, Any]:
    """What must be the same for a run to be resumed; part of config.json."""
    return {"data": data, "recipe": recipe.to_dict()}


class RunFolder:
    """RUN: config.json, split.json, checkpoint.pt, adapter.safetensors (model.safetensors after full fine-tuning,
    context.safetensors after CoOp), metrics.json, history.csv, predictions.csv, report.html and log/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.split = path / "split.json"
        self.checkpoint = path / "checkpoint.pt"
        self.adapter = path / "adapter.safetensors"
        self.model = path / "model.safetensors"
        self.context = path / "context.safetensors"
        self.metrics = path / "metrics.json"
        self.predictions = path / "predictions.csv"
        self.history = path / "history.csv"
        self.report = path / "report.html"
        self.log = path / "log"
        self.files = (
            self.config, self.split, self.checkpoint, self.adapter, self.model, self.context, self.metrics, self.predictions,
            self.history, self.report,
        )  # fmt: skip

    def owned(self) -> AbstractContextManager[None]:
        """Within: this thread alone works here; the folder is made if it is not there. Whoever writes owns it: lock.owned."""
        return owned(self.path)

    def holds(self) -> list[Path]:
        """Return what is here by the name of something that a run leaves."""
        return [path for path in (*self.files, self.log) if os.path.lexists(path)]

    def check(self, identity: dict[str, Any], resume: bool) -> None:
        """Raise UserError unless a run with this identity (what config.json will hold) may write here, or has finished."""
        check_free(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out {self.path} is a file, not a folder")
        if self.config.is_file():
            if not resume:
                raise UserError(f"--out {self.path} holds another run: choose another folder, or go on with it by --resume")
            there = self.read_config()
            for key, value in _flat(json.loads(json.dumps(identity))).items():
                if _flat(there).get(key) != value and not (key == "data" and self._knows_images()):
                    was = _flat(there).get(key)
                    raise UserError(f"--resume: the run in {self.path} has {key} = {was!r}, now it is {value!r}")
            if self.metrics.is_file():
                return
        else:
            self.check_empty()
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"--out {self.path}: no permission to write in {existing}")
        self.check_space(LEAST_SPACE)

    def check_empty(self) -> None:
        """Raise UserError if something is here that would be overwritten: another result, or files of the user's."""
        check_free(self.path)
        if there := self.holds():
            names = ", ".join(path.name for path in there)
            what = f"another result or files of yours ({names})"
            raise UserError(f"--out {self.path} holds {what}, which would be overwritten: choose another folder")

    def check_classes(self, classes: Sequence[str]) -> None:
        """Raise UserError if the run that is here began with other class names."""
        there = self.read_config().get("classes") if self.config.is_file() else None
        if there is not None and there != list(classes):
            was, now = next(((a, b) for a, b in zip(there, classes, strict=False) if a != b), (len(there), len(classes)))
            raise UserError(
                f"--resume: the run in {self.path} has the class {was!r} where there is {now!r} now:"
                " put it back, or begin another run in another --out"
            )

    def check_space(self, needed: int) -> None:
        """Raise UserError unless `needed` bytes are free where the folder is, or will be."""
        existing = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise UserError(f"no space left for --out {self.path}: {needed >> 20} MiB are needed, {free >> 20} MiB are free")

    def remove_leftovers(self) -> None:
        """Remove what a run that was killed left half-written; for the folder's owner."""
        for path in self.files:
            for leftover in leftovers(path):
                leftover.unlink(missing_ok=True)

    def read_config(self) -> dict[str, Any]:
        """config.json.

        Raises:
            UserError: there is none, or it is not ours.
        """
        try:
            config = json.loads(self.config.read_text(encoding="utf-8"))
            config["recipe"]["lora"]
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not the folder of a run: it has no config.json") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} is not the config of a run: {error!r}") from error
        return config

    def _knows_images(self) -> bool:
        """Whether the trainer will compare the images with those of a checkpoint, so that they may lie elsewhere by now."""
        return self.checkpoint.is_file() and not self.metrics.is_file() and "digests" in self.read_split()

    def read_split(self) -> dict[str, Any]:
        """split.json: the names of the images that the run drew, by role, and their digests, which older runs did not keep.

        Raises:
            UserError: there is none, or it is damaged.
        """
        try:
            split = json.loads(self.split.read_text(encoding="utf-8"))
            split["train"], split["val"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.split} is not the split of a run: {error!r}") from error
        return split


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
