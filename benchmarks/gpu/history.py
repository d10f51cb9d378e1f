"""What rows on disk say has been done: so that a run that was stopped, or killed, goes on where it was."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable
from pathlib import Path

from rows import ROOT, read_rows

from .items import Item, Row

__all__ = ["History", "tree"]

TRIES = 2  # an item that has failed so often is left


def tree(root: Path = ROOT) -> str:
    """A hash of the source that rows are measured with: unlike a commit, a copy of the tree without .git has it too."""
    digest = hashlib.sha256()
    for folder in ("fastlora", "kernels", "benchmarks"):
        for path in sorted(root.joinpath(folder).rglob("*")):
            if path.suffix in (".py", ".c", ".h"):
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class History:
    """How often each item has failed, and whether it ended, on the same GPU with the same source.

    What was killed from outside, or stopped because the time was up, has neither ended nor failed.

    Args:
        paths: files of rows, or folders of them.
        same: what the header of a row must say for the row to count, "gpu" and "tree" for instance.
    """

    def __init__(self, paths: Iterable[Path], same: Row) -> None:
        self.failures: collections.Counter[str] = collections.Counter()
        self.ended: set[str] = set()
        self.first_bits: dict[str, Row] = {}
        files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.jsonl")))]
        for file in dict.fromkeys(file.resolve() for file in files):
            counts = False
            for row in read_rows(file):
                if row["row"] == "run":
                    counts = all(row.get(key) == value for key, value in same.items())
                elif counts:
                    self.take(row)

    def take(self, row: Row) -> None:
        """Take in a row of this GPU and source."""
        if row["row"] == "failed":
            self.failures[row["item"]] += 1
        elif row["row"] == "end" and row["ok"]:
            self.ended.add(row["item"])
        elif row["row"] == "bits":
            self.first_bits.setdefault(row["case"], row)

    def left(self, items: Iterable[Item]) -> list[Item]:
        """What is still to be done: in order, but what has failed before comes last, once more."""
        todo = [item for item in items if item.key not in self.ended and self.failures[item.key] < TRIES]
        return sorted(todo, key=lambda item: self.failures[item.key])
