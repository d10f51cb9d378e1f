"""benchmarks/device.py, ready for whoever has a GPU and ten minutes: each mode at tiny size, and what it does in trouble."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import device
import device_steps
import device_tests
from baselines import TRAINEES
from bench_support import BENCHMARKS, names, run_benchmark
from machine import Ceilings, Rows, environment, read_rows
from measure import summary
from run import Run, finished
from waiting import HANG, wait

SCRIPT = str(BENCHMARKS / "device.py")
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script is run at its real size")


def make(folder: Path, seconds: float = HANG, kind: str = "cpu", commit: str | None = "abc") -> Run:
    rows = Rows(folder / "step-gpu-1.jsonl", {"commit": commit})
    return Run(torch.device(kind), rows, Ceilings(kind, "float32", 1.0, 1.0), time.monotonic() + seconds, smoke=False)


@on_a_cpu
def test_one_layer_at_tiny_size(tmp_path: Path) -> None:
    rows = run_benchmark(SCRIPT, "--smoke", "--commit", "0123456789abcdef", "--out", str(tmp_path), folder=tmp_path)
    assert {"frozen", "fastlora eager", "textbook", "dense ΔW", "full fine-tuning"} <= names(rows)
    assert {row["phase"] for row in rows if "median_ms" in row} == {"forward", "backward", "both"}
    assert not [row for row in rows if "refused" in row or "failed" in row]


@on_a_cpu
@pytest.mark.slow
def test_tuning_at_tiny_size(tmp_path: Path) -> None:
    """In Triton's interpreter: the alternatives of the tile table reach the kernels and pass the gate."""
    pytest.importorskip("triton", reason="Triton is for Linux only")
    rows = run_benchmark(SCRIPT, "--smoke", "--tune", "--out", str(tmp_path), folder=tmp_path)
    tuned = [row for row in rows if row["row"] == "tune"]
    assert {row["phase"] for row in tuned} == {"forward", "backward"} and len({row["plan"] for row in tuned}) >= 3
    assert all("median_ms" in row for row in tuned), [row for row in tuned if "median_ms" not in row]


@on_a_cpu
@pytest.mark.slow
def test_steps_at_tiny_size(tmp_path: Path) -> None:
    """Every way of adapting that is installed passes its gate and is timed; the next run finds nothing left to do."""
    rows = run_benchmark(SCRIPT, "--smoke", "--step", "--out", str(tmp_path), folder=tmp_path)
    runs = {name for name, trainee in TRAINEES.items() if trainee.missing() is None and not trainee.compiles}
    assert names(rows) == runs and not [row for row in rows if "refused" in row or "failed" in row]
    timed = [row for row in rows if "median_ms" in row]
    assert all(row["engine"] == "as written" and row["classes"] == 3 and row["median_ms"] > 0 for row in timed)
    commit = environment(torch.device("cpu"))["commit"]
    settled = {(row["case"], row["contestant"], row["engine"]) for row in rows if row["row"] == "step"}
    assert finished("step", "cpu", commit, {tmp_path}) == (settled if commit else set())


def test_engines_name_contestants_that_exist() -> None:
    assert {name for names in device_steps.ENGINES.values() for name in names} <= TRAINEES.keys()
    assert device_steps.ENGINES.keys() == device_steps.NEEDS.keys()


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """What was measured, refused, skipped or cost the context is settled; a plain failure and half a line are not."""
    run = make(tmp_path)
    row = {"row": "step", "case": "c", "engine": "graph", "phase": "step"}
    for name, found in (
        ("timed", {"median_ms": 1.0}), ("wrong", {"refused": ["dx"]}), ("absent", {"skipped": "peft"}),
        ("fatal", {"failed": "CUDA error", "broke": True}), ("unlucky", {"failed": "out of memory"}),
    ):  # fmt: skip
        run.rows.add(row | {"contestant": name} | found)
    with run.rows.path.open("a") as file:
        file.write('{"row": "step", "case": "c", "contestant": "half')
    found = {contestant for _, contestant, _ in finished("step", "gpu", "abc", {tmp_path})}
    assert found == {"timed", "wrong", "absent", "fatal"}
    for what, machine, commit in (
        ("tune", "gpu", "abc"),
        ("step", "other", "abc"),
        ("step", "gpu", "def"),
        ("step", "gpu", None),
    ):
        assert not finished(what, machine, commit, {tmp_path})


def test_a_lost_context_is_noticed_and_told_from_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    run = make(tmp_path, kind="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    run.failed({"row": "op"}, ValueError("a tile"))
    assert not run.broken and not run.over(10)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    run.failed({"row": "op"}, RuntimeError("anything"))
    assert run.broken and run.over(0)
    assert ["broke" in row for row in read_rows(run.rows.path)[1:]] == [False, True]


@on_a_cpu
@pytest.mark.parametrize("commit", ["abc", None])
def test_a_lost_context_starts_the_script_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str | None) -> None:
    """Behind what lost it, which only a known commit can tell, with the time that is left and without the tests."""
    started: list[Any] = []

    def loses(run: Run, options: Any) -> bool:
        run.broken = True
        return True

    monkeypatch.setattr(device, "measure_layers", loses)
    monkeypatch.setattr(device, "environment", lambda *_: {"date": "2026-01-01T00:00:00", "commit": commit})
    monkeypatch.setattr(device.os, "execv", lambda *command: started.append(command))
    device.main(["--smoke", "--budget", "10000", "--out", str(tmp_path)])
    if commit is None:
        assert not started
        return
    ((program, command),) = started
    again = device.parse(command[2:])
    assert program == command[0] == sys.executable and Path(command[1]).name == "device.py"
    assert again.no_tests and again.smoke and again.out == tmp_path and 10_000 - HANG < again.budget < 10_000


def test_tests_are_stopped_at_the_limit_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that hangs costs its limit, not what the others said; its processes are gone."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu:\n")
    (tmp_path / "tests" / "test_x.py").write_text(
        "import os, pathlib, time, pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\ndef test_wrong(): assert 1 == 2\n"
        "def test_hangs():\n    pathlib.Path('pid').write_text(str(os.getpid()))\n    time.sleep(3600)\n"
    )
    (tmp_path / "tests" / "test_y.py").write_text("import a_library_that_is_not_here\n")
    monkeypatch.setattr(device_tests, "ROOT", tmp_path)
    monkeypatch.setattr(device_tests, "WORKERS", 1)

    class Limited(subprocess.Popen[str]):
        """Its limit ends once the last test hangs, however long a busy machine takes to get there."""

        def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[str, str]:
            if timeout != 7.0:
                return super().communicate(input, None if timeout is None else HANG)
            wait(lambda: (tmp_path / "pid").exists() and {b"PASSED", b"FAILED"} <= set(self.said().split()))
            raise subprocess.TimeoutExpired(self.args, timeout)

        def said(self) -> bytes:
            try:
                super().communicate(timeout=0.1)
            except subprocess.TimeoutExpired as so_far:
                return so_far.output or b""
            raise AssertionError("it did not hang")

    monkeypatch.setattr(device_tests.subprocess, "Popen", Limited)
    run = make(tmp_path)
    assert not device_tests.run_tests(run, 7.0, "gpu")
    (row,) = [row for row in read_rows(run.rows.path) if row["row"] == "tests"]
    assert (row["passed"], row["failed"], row["ending"]) == (1, 1, "stopped at the limit")
    assert "assert 1 == 2" in row["output"]
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    wait(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")
    (tmp_path / "tests" / "test_x.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_right(): pass\n")
    assert device_tests.run_tests(run, HANG, "gpu") is True


def test_benchmarks_import_no_circle() -> None:
    """Inside functions and for annotations alone too."""
    scripts = {path.stem: ast.walk(ast.parse(path.read_text())) for path in BENCHMARKS.glob("*.py")}
    imports: dict[str, set[str]] = {}
    for name, nodes in scripts.items():
        found = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        modules = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in found}
        imports[name] = {module for module in modules if module in scripts}
    assert "run" in imports["tune"] and "tune" in imports["device"]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_what_cannot_be_captured_keeps_its_time_by_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    run = make(tmp_path, kind="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(device, "phase_calls", lambda bounds, phase: [])
    monkeypatch.setattr(device, "by_events", lambda calls, budget: summary([1.0], "events"))
    monkeypatch.setattr(device, "by_graph", refuses)
    timings = list(device._methods(run, [], "forward", None, {"row": "op", "contestant": "c"}))
    assert [timing.method for timing in timings] == ["events"] and not run.broken
    assert "capturing" in read_rows(run.rows.path)[-1]["failed"]
