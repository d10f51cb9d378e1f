"""The Ray engine on a local cluster of two workers that are killed on the way: nothing is lost, nothing done twice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from fastlora.fewshot.sweep import results
from pictures import command, make_folder, tiny_clip
from waiting import HANG, wait

pytest.importorskip("ray", reason="the Ray engine is an optional extra: pip install ray")


def owner(lock: Path) -> int:
    """The process that says in `lock` that it is at work; 0 if none does."""
    with contextlib.suppress(FileNotFoundError):
        if said := re.match("process ([0-9]+) on ", lock.read_text()):
            return int(said[1])
    return 0


def two_killed(out: Path, killed: dict[int, str]) -> bool:
    """Kill workers that are in the middle of a run, until there were two; they are held still while that is looked up."""
    for lock in out.glob("*/.lock"):
        pid = owner(lock)
        if not pid or pid in killed or (lock.parent / "metrics.json").exists():
            continue
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, signal.SIGSTOP)
            wait(lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX")
            if owner(lock) == pid and not (lock.parent / "metrics.json").exists():
                os.kill(pid, signal.SIGKILL)
                killed[pid] = lock.parent.name
            os.kill(pid, signal.SIGCONT)
        if len(killed) == 2:
            return True
    return False


@pytest.mark.slow
def test_two_workers_killed_on_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = {
        "data": str(make_folder(tmp_path / "pictures", ["red", "green", "blue"], images=6)),
        "model": tiny_clip(tmp_path / "tiny"), "pretrained": "none", "shots": [1, 2], "seeds": [1, 2],
        "rank": [1, 2], "iterations": 60, "batch_size": 4, "lr": 1e-2,
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    arguments = command("sweep", str(tmp_path / "grid.yaml"), "--out", str(out), "--device", "cpu", "--engine", "ray")
    killed: dict[int, str] = {}
    with subprocess.Popen(
        [*arguments, "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
    ) as process:
        wait(lambda: process.poll() is not None or two_killed(out, killed))
        said = process.communicate(timeout=HANG)[0]
    assert process.returncode == 0 and len(killed) == 2, said
    rows = results.read_rows(out / "rows.jsonl")
    assert len(rows) == len({row["run"] for row in rows}) == 8
    assert {path.parent.name for path in out.glob("*/metrics.json")} == {row["run"] for row in rows}
    assert set(killed.values()) <= {row["run"] for row in rows}
    # what each run learned is there, and no run took a step more or less than asked
    assert all(len((out / row["run"] / "history.csv").read_text().splitlines()) == 61 for row in rows)
