"""benchmarks/device.py, ready for whoever has a GPU and fourteen minutes: every part at tiny size, and its exit status."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import device
from baselines import TRAINEES
from bench_support import BENCHMARKS, names, without_interpreter
from fastlora.bench.rows import read
from fastlora.bench.tables import everything
from gpu import plan, steps
from gpu.items import CANARY, PARTS
from gpu.summary import summary
from ops import CONTESTANTS
from rows import read_rows
from waiting import HANG, wait

SCRIPT = str(BENCHMARKS / "device.py")
ROOT = BENCHMARKS.parent
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the script is run at its real size")


def run(folder: Path, *arguments: str, status: int = 0) -> tuple[str, list[dict[str, Any]]]:
    """The script at tiny size, its output and all rows of the folder."""
    command = [sys.executable, SCRIPT, "--smoke", "--minutes", str(HANG / 60), "--out", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=without_interpreter(), timeout=2 * HANG)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, rows(folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(path)]


def ended(found: list[dict[str, Any]]) -> list[str]:
    return [row["item"] for row in found if row["row"] == "end"]


@on_a_cpu
@pytest.mark.slow
def test_every_part_at_tiny_size(tmp_path: Path) -> None:
    """Everything is done and right; a second call finds nothing left to do."""
    output, found = run(tmp_path)
    items = plan.all_items(90, "cpu", True)
    assert sorted(ended(found)) == sorted(item.key for item in items) and {item.part for item in items} == PARTS.keys() - {"i"}
    assert not [row for row in found if "refused" in row or "failed" in row]
    compiled = [row for row in found if row["row"] == "ahead"]
    assert len(compiled) == 2 and all(row["done"] == row["kernels"] > 10 and row["wrong"] == 0 for row in compiled)
    assert "kernels to compile" in output and output.count("the clock") == 2 and "not reached" not in output
    assert isinstance(everything(read(tmp_path)), list)  # as `fastlora bench` shows them

    of = {part: [row for row in found if row.get("part") == part] for part in PARTS}
    assert {row["direction"] for row in of["a"] if row["row"] == "check" and "direction" in row} == {"forward", "backward"}
    layers = {c.name for c in CONTESTANTS if not c.compiles and c.name != "fastlora triton"}
    for part in "bf":
        assert {row["contestant"] for row in of[part] if "median_ms" in row} == layers
        assert {row["phase"] for row in of[part] if "median_ms" in row} == {"forward", "backward", "both"}
    assert names(of["c"]) == {name for name, _ in steps.WAYS if TRAINEES[name].missing() is None}
    assert {row["engine"] for row in of["c"] if "median_ms" in row} == {"graph", "as written"}
    assert {row["phase"] for row in of["d"] if row["row"] == "tune"} == {"forward", "backward"}
    assert len({row["contestant"] for row in of["e"] if row["row"] == "gemm" and row["error"] < 1e-5}) == 6
    assert [row["same"] for row in of["h"] if row["row"] == "bits"] == [True, True]

    _, again = run(tmp_path, "--rest")
    assert len(ended(again)) == len(items)


@on_a_cpu
@pytest.mark.slow
def test_a_call_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed with its worker at two moments, and started again each time: everything is done, nothing twice."""
    items = [item.key for item in plan.all_items(90, "cpu", True, "b")]

    def far_enough(process: subprocess.Popen[bytes], number: int) -> bool:
        return len(ended(rows(tmp_path))) > 3 * number or process.poll() is not None

    for number in range(2):
        command = [sys.executable, SCRIPT, "--smoke", "--parts", "b", "--minutes", "60", "--out", str(tmp_path)]
        process = subprocess.Popen(command, env=without_interpreter(), start_new_session=True, stdout=subprocess.DEVNULL)
        try:
            wait(functools.partial(far_enough, process, number))
            assert process.poll() is None, "it was done before it could be killed"
        finally:
            for stat in Path("/proc").glob("[0-9]*/stat"):  # whoever was started, with no chance to say anything
                text = stat.read_text() if stat.exists() else ""
                if str(tmp_path).encode() in (stat.parent / "cmdline").read_bytes() if text else False:
                    os.kill(int(stat.parent.name), signal.SIGKILL)
            process.wait()
    _, found = run(tmp_path, "--parts", "b")
    assert sorted(ended(found)) == sorted(items)
    assert sum(row["row"] == "run" for row in found) == 3


@on_a_cpu
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--canary", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=without_interpreter(),
        timeout=HANG,
    )
    assert done.returncode == device.CANNOT and "--smoke runs its code on a CPU" in done.stderr
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "bz"], "there is no part z"),
        (["--minutes", "0"], "must be more than 0"),
        (["--canary", "--rest"], "not allowed"),
    ],
)
def test_bad_options_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        device.parse(arguments)
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_halves() -> None:
    assert device.chosen(device.parse(["--canary"])) == CANARY
    assert device.chosen(device.parse(["--rest"])) == "".join(PARTS).replace(CANARY, "")
    assert device.chosen(device.parse(["--parts", "cab"])) == "abc"


def end(item: str, **more: Any) -> dict[str, Any]:
    return {
        "row": "end",
        "item": item,
        "part": item[0],
        "ok": True,
        "seconds": 1.0,
        "expected_s": 1.0,
        "waited_s": 0.0,
    } | more


@pytest.mark.parametrize(
    ("parts", "row", "status"),
    [
        ("a", {}, device.RIGHT),
        ("a", {"row": "check", "refused": ["dA group 0"]}, device.WRONG),
        ("a", {"row": "failed", "failed": "it hangs", "contestant": "fastlora triton"}, device.WRONG),
        ("b", {"row": "op", "part": "b", "contestant": "fastlora triton", "refused": ["y"]}, device.WRONG),
        ("b", {"row": "failed", "part": "c", "contestant": "full fine-tuning", "failed": "out of memory"}, device.RIGHT),
        ("d", {"row": "tune", "part": "d", "contestant": "fastlora triton", "refused": ["a race"]}, device.RIGHT),
    ],
)
def test_the_exit_status_says_whether_to_go_on(parts: str, row: dict[str, Any], status: int) -> None:
    """A rival that fails is a result, and so is a plan that is tried and refused."""
    found = [{"row": "plan", "left": [f"{parts}: one"], "spare": []}, end(f"{parts}: one"), *([row] if row else [])]
    assert device.verdict(parts, found) == status


def test_a_canary_that_was_not_finished_is_not_green() -> None:
    found = [{"row": "plan", "left": ["a: one", "a: two"], "spare": []}, end("a: one")]
    assert device.verdict("a", found) == device.UNFINISHED
    found[0]["spare"] = ["a: two"]  # the tests, for which time may not be left
    assert device.verdict("a", found) == device.RIGHT
    found = [{"row": "plan", "left": ["b: one", "b: two"], "spare": []}, end("b: one")]
    assert device.verdict("b", found) == device.RIGHT


def test_the_summary_shows_what_is_missing() -> None:
    op = {"row": "op", "phase": "both", "method": "clock", "rank": 4, "m": 8, "k": 32, "dropout": 0.0}
    found = [op | {"case": "c", "contestant": name, "median_ms": ms} for name, ms in (("frozen", 2.0), ("ours", 3.0))]
    lines = summary([*found, op | {"case": "d", "contestant": "frozen", "median_ms": 1.0}], []).splitlines()
    assert lines[-2].split()[-2:] == ["2000", "1.50"] and lines[-1].split()[-1] == "–"


def test_the_summary_fits_a_terminal_and_names_what_is_wrong() -> None:
    case = "qkv 50432x768->2304 r=16 p=0.25 bfloat16"
    op = {"row": "op", "case": case, "phase": "both", "method": "graph", "rank": 16, "m": 50432, "k": 768, "dropout": 0.25}
    step = {"row": "step", "part": "c", "classes": 1000, "engine": "graph", "peak_bytes": 2**34}
    found = [
        {"row": "run", "gpu": "NVIDIA H100 80GB HBM3"},
        {"row": "check", "part": "a", "item": "a: x", "case": "x", "worst": 0.5},
        {"row": "check", "part": "a", "item": "a: table", "case": "table", "refused": ["forward: " + "y " * 200]},
        *(op | {"contestant": c.name, "median_ms": 1.0 + i} for i, c in enumerate(CONTESTANTS)),
        *(step | {"contestant": name, "median_ms": 100.0} for name in TRAINEES),
        step | {"contestant": "the paper's arithmetic", "engine": "as written", "median_ms": 150.0},
        *(
            {"row": "gemm", "product": "x Wᵀ", "m": 50432, "k": 768, "n": 2304, "contestant": name, "tflops": speed}
            for name, speed in (("cuBLAS", 600.0), ("Triton a", 450.0), ("Triton b", 510.0))
        ),
        {"row": "tune", "case": case, "phase": "forward", "change": "as it stands", "median_ms": 0.4},
        {"row": "tune", "case": case, "phase": "forward", "change": "forward 64x128x64 4w 4s", "median_ms": 0.3},
        {"row": "bits", "part": "h", "case": case, "same": False},
        end("b: one", compiled_late=1),
        {"row": "ahead", "kernels": 3, "done": 2, "wrong": 1},
    ]
    text = summary(found, ["g: " + case, "g: two", "g: three"])
    assert not [line for line in text.splitlines() if len(line) > 80 and "a: table" not in line]
    for words in (
        "1 checks right, 1 red", "a: table: forward:", "0.85", "400.0 µs as it stands, best of 2: 300.0 µs", "0 of 1 cases",
        "Measured(GPU, 50432, 2000.0, 3000.0)", "100.0  1.5×", "16.0", "and 1 more", "2 of 3 kernels, 1 refused",
    ):  # fmt: skip
        assert words in text, (words, text)


def test_benchmarks_import_no_circle() -> None:
    """Inside functions and for annotations alone too."""
    scripts: dict[str, Path] = {}
    for path in [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("gpu/*.py")]:
        scripts[f"gpu.{path.stem}" if path.parent.name == "gpu" else path.stem] = path
    imports: dict[str, set[str]] = {}
    for name, path in scripts.items():
        imports[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = f"gpu.{node.module}" if node.level else str(node.module)
                imports[name] |= {module} | {f"{module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imports[name] |= {alias.name for alias in node.names}
        imports[name] &= scripts.keys() - {name, "gpu.__init__"}
    assert "gpu.plan" in imports["device"] and "gpu.run" in imports["gpu.canary"]
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_the_process_that_watches_imports_no_torch() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import device, gpu.summary; sys.exit('torch' in sys.modules)"
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], timeout=HANG)
    assert done.returncode == 0, f"after {time.monotonic() - begun:.1f} s"
