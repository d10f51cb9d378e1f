"""What keeping freed memory is worth, and what a user of other code has without it: one process each, as its user would run it.

`fastlora train` lets its process keep what it frees (fastlora/fewshot/memory.py); steps timed side by side share one process,
so there every contestant has that. A script of somebody else's has not: here the paper's arithmetic runs as it would by itself,
fastlora both ways.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from baselines import TRAINEES, Job
from fastlora.bench.rows import OURS, PAPER
from fastlora.fewshot.memory import keep_freed
from measure import summary
from memory import fresh_process, ready
from steps import in_turn, seconds_of_step

CASES = [(OURS, True), (OURS, False), (PAPER, False)]


def measure(job: Job, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant and way: `rounds` steps of a fresh process, warmed up."""
    rows = []
    for name, keeps in CASES:
        found = fresh_process(Path(__file__), name, json.dumps(dataclasses.asdict(job)), str(int(keeps)), str(rounds))
        rows.append({"row": "allocator", **job.row(), "contestant": name, "keeps_freed": keeps, **found})
        print(f"{job.name}: {name}, {'keeps' if keeps else 'gives back'}: {found.get('all_ms', found)}", flush=True)
    return rows


def _here(name: str, job: Job, keeps: bool, rounds: int) -> dict[str, Any]:
    if keeps and not keep_freed():
        return {"skipped": "this C library cannot be told to keep what is freed"}
    taken = in_turn({name: partial(seconds_of_step, ready(TRAINEES[name], job))}, rounds, job.name)[name]
    return summary(taken.seconds, "clock").row() | taken.row()


if __name__ == "__main__":
    print(json.dumps(_here(sys.argv[1], Job(**json.loads(sys.argv[2])), sys.argv[3] == "1", int(sys.argv[4]))))
