"""What fastlora itself wrote among the data: a run, a sweep, a result of eval. It is no class, whatever it is called."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..lock import LOCK_FILES
from ..runfolder import RunFolder

__all__ = ["is_ours"]


def is_ours(folder: Path) -> bool:
    """Return whether fastlora wrote `folder`: a run, a sweep, a result of eval, or a folder that holds nothing but such.

    A folder of somebody else's that holds a config.json or metrics.json is not ours.
    """
    if _is_run(folder) or _is_result(folder) or _is_sweep(folder):
        return True
    below = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir(follow_symlinks=False) or not is_ours(Path(entry.path)):
                    return False
                below = True
    except OSError:  # whoever reads the folder says why
        return False
    return below or any((folder / name).is_file() for name in LOCK_FILES)  # a run that has just begun holds nothing else


def _is_run(folder: Path) -> bool:
    try:
        return bool(RunFolder(folder).read_config())
    except UserError:
        return False


def _is_result(folder: Path) -> bool:
    said = _read(RunFolder(folder).metrics, whole=True)
    return isinstance(said, dict) and {"method", "per_class", "resolved"} <= said.keys()


def _is_sweep(folder: Path) -> bool:
    said = _read(folder / "rows.jsonl", whole=False)
    return isinstance(said, dict) and {"run", "variant"} <= said.keys()


def _read(file: Path, whole: bool) -> Any:
    """The JSON value in `file`, or in its first line; None where there is none."""
    try:
        with open(file, encoding="utf-8") as opened:
            return json.loads(opened.read() if whole else opened.readline())
    except (OSError, ValueError):
        return None
