"""How benchmarks/device.py keeps to its minutes and goes on: what hangs, crashes, is killed or is too slow."""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu import run as running
from gpu import supervise
from gpu.history import TRIES, History, tree
from gpu.items import Item, Row
from gpu.run import Run, carry_out
from rows import Rows, complete_lines, read_rows
from waiting import HANG, wait

SAME = {"gpu": "H100", "tree": "abc"}


class Compiled:
    """Stands in for gpu.ahead.Ahead: everything is compiled, but what `wrong` names."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong

    def wait(self, item: Item, limit: float) -> list[str]:
        return ["forward_kernel: race"] if self.wrong and self.wrong in item.name else []


def make(folder: Path, seconds: float = HANG, device: str = "cpu", ahead: Any = None) -> Run:
    rows = Rows(folder / f"rows-{len(list(folder.glob('*')))}.jsonl", SAME)
    history = History([folder], SAME)
    return Run(torch.device(device), rows, time.monotonic() + seconds, True, history, ahead or Compiled())


def item(name: str, seconds: float = 0.0, work: Any = None, **more: Any) -> Item:
    def measure(run: Run) -> Iterator[Row]:
        yield {"row": "op", "median_ms": 1.0}

    return Item("b", name, seconds, work or measure, about={"contestant": "fastlora triton"}, **more)


def ended(run: Run) -> list[str]:
    return [row["item"] for row in read_rows(run.rows.path) if row["row"] == "end"]


def raises(error: Exception, run: Run) -> Iterator[Row]:
    yield {"row": "op", "phase": "forward"}
    raise error


def test_items_are_done_once_and_a_failure_costs_its_own_row(tmp_path: Path) -> None:
    items = [item("a"), item("bad", work=functools.partial(raises, ValueError("a tile"))), item("c")]
    first = make(tmp_path)
    carry_out(first, items)
    assert ended(first) == ["b: a", "b: bad", "b: c"]
    rows = read_rows(first.rows.path)
    assert [row["failed"] for row in rows if row["row"] == "failed"] == ["ValueError('a tile')"]
    assert all(row["contestant"] == "fastlora triton" for row in rows if row["row"] != "run")
    assert [row["row"] for row in rows if row.get("item") == "b: bad"] == ["begin", "op", "failed", "end"]
    second = make(tmp_path)  # what has failed is tried once more, and then left
    carry_out(second, items)
    assert ended(second) == ["b: bad"] and TRIES == 2
    third = make(tmp_path)
    carry_out(third, items)
    assert ended(third) == []


def test_what_has_failed_comes_last(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.add({"row": "failed", "item": "b: a", "failed": "it hangs"})
    assert [one.key for one in run.history.left([item("a"), item("c")])] == ["b: c", "b: a"]


def test_rows_of_another_gpu_or_source_settle_nothing(tmp_path: Path) -> None:
    for name, header in (("gpu", {"gpu": "A100", "tree": "abc"}), ("tree", {"gpu": "H100", "tree": "def"})):
        Rows(tmp_path / f"{name}.jsonl", header).add({"row": "end", "item": "b: a", "ok": True})
    assert len(make(tmp_path).history.left([item("a")])) == 1


def test_the_source_is_known_without_git(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("x = 1\n")
    before = tree(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert tree(tmp_path) == before
    (tmp_path / "kernels" / "a.py").write_text("x = 2\n")
    assert tree(tmp_path) != before


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row": "run"}\n{"row": "op", "med')
    assert read_rows(path) == [{"row": "run"}]
    complete_lines(path)
    Rows(path, {"gpu": "H100"}, more=True)
    assert [row["row"] for row in read_rows(path)] == ["run", "run"]


def test_slow_parts_do_not_pass_the_budget(tmp_path: Path) -> None:
    """An item is begun only if it is expected to fit; the ones left are named, and a shorter one behind them is done."""

    def slow(run: Run) -> Iterator[Row]:
        time.sleep(0.6)
        yield {"row": "op"}

    run = make(tmp_path, seconds=1.0)
    begun = time.monotonic()
    carry_out(run, [item("slow", 0.5, slow), item("slow too", 0.5, slow), item("long", 100.0), item("short", 0.0)])
    assert time.monotonic() - begun < 1.0 and ended(run) == ["b: slow", "b: short"]
    assert [row["item"] for row in read_rows(run.rows.path) if row["row"] == "left out"] == ["b: slow too", "b: long"]


def test_what_did_not_compile_is_refused_where_it_matters(tmp_path: Path) -> None:
    run = make(tmp_path, ahead=Compiled(wrong="racing"))
    carry_out(run, [item("racing plan", strict=True), item("racing row")])
    rows = read_rows(run.rows.path)
    assert [row["item"] for row in rows if row["row"] == "op"] == ["b: racing row"]
    assert [row["item"] for row in rows if "refused" in row] == ["b: racing plan"]


def test_a_lost_context_is_noticed_and_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    run = make(tmp_path, device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.zeros(1))
    for name in ("current_stream", "default_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    carry_out(run, [item("unlucky", work=functools.partial(raises, ValueError("a tile")))])
    assert not run.broken
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    carry_out(run, [item("fatal", work=functools.partial(raises, RuntimeError("anything"))), item("behind it")])
    assert run.broken and ended(run) == ["b: unlucky", "b: fatal"]
    assert ["broke" in row for row in read_rows(run.rows.path) if row["row"] == "failed"] == [False, True]


# A worker that does the items that are named on its command line, as `how` says, in place of device.py's.
WORKER = """
import json, os, signal, sys, time
path, *items = sys.argv[1:-2]
with open(path, "a") as file:
    def add(**row):
        file.write(json.dumps(row) + "\\n")
        file.flush()
    add(row="run")
    done = {json.loads(line).get("item") for line in open(path) if '"end"' in line or '"failed"' in line}
    for item in items:
        if item in done:
            continue
        add(row="begin", item=item, part="b", expected_s=0.0, contestant="fastlora triton")
        if item == "hangs":
            time.sleep(3600)
        if item == "dies":
            file.write('{"row": "op", "half')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(row="end", item=item, part="b", ok=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return [sys.executable, str(script), str(tmp_path / "rows.jsonl")]


def test_a_worker_that_dies_is_started_anew_behind_what_killed_it(tmp_path: Path, worker: list[str]) -> None:
    watch = supervise.supervise([*worker, "a", "dies", "c"], tmp_path / "rows.jsonl", HANG / 60)
    assert watch.status == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row["item"] for row in rows if row["row"] == "end"] == ["a", "c"]
    assert [(row["item"], row["failed"]) for row in rows if row["row"] == "failed"] == [
        ("dies", f"its process ended with status {-signal.SIGKILL}")
    ]


def test_what_hangs_is_ended(tmp_path: Path, worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "HANGS", 1.0)
    watch = supervise.supervise([*worker, "hangs", "c"], tmp_path / "rows.jsonl", HANG / 60)
    assert [row["item"] for row in watch.rows if row["row"] == "end"] == ["c"]
    assert [row["failed"].split(":")[0] for row in watch.rows if row["row"] == "failed"] == ["it hangs"]


def test_the_minutes_are_kept_whatever_the_worker_does(tmp_path: Path, worker: list[str]) -> None:
    begun = time.monotonic()
    seconds = supervise.GRACE + 3
    watch = supervise.supervise([*worker, "hangs"], tmp_path / "rows.jsonl", seconds / 60)
    assert time.monotonic() - begun < seconds
    # stopped, not failed: the next call does it
    assert [row["row"] for row in watch.rows if row.get("item") == "hangs"] == ["begin", "stopped"]


def test_what_the_worker_started_ends_with_it(tmp_path: Path) -> None:
    """Its compilers, and the tests, which are a process group of their own."""
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], preexec_fn=os.setpgrp)
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid) + chr(10))
time.sleep(3600)
"""
    process = supervise._start([sys.executable, "-c", code])
    pid = tmp_path / "pid"
    wait(lambda: pid.exists() and pid.read_text().endswith("\n"))
    supervise._stop(process)
    stat = Path("/proc", pid.read_text().strip(), "stat")
    wait(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")


def test_kernels_compiled_in_this_process_are_counted() -> None:
    with running.compilations() as names:
        from triton import knobs

        for hit in (True, False):
            knobs.compilation.listener(
                src=type("Source", (), {"name": "forward_kernel"}), cache_hit=hit, metadata={}, times=None
            )
    assert names == ["forward_kernel"]
