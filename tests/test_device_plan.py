"""What benchmarks/device.py plans: its minutes, its items, the tests that it has run; and its guide."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import device
from baselines import TRAINEES, Job, few_prompts
from bench_support import BENCHMARKS, without_interpreter
from fastlora import mini
from gpu import canary, layers, plan, step_check, steps, suite
from gpu.items import CANARY, PARTS
from step_gate import DRAWS, FEW
from waiting import HANG, wait


def test_the_minutes_suffice() -> None:
    """The canary within its 150 s, and what matters of the rest within ten minutes, the start of the process included."""
    start = 25.0
    seconds = {part: sum(item.seconds for item in plan.all_items(90, "cuda", False, part)) for part in PARTS}
    assert seconds[CANARY] + start <= 60 * device.MINUTES["canary"] == 150
    assert sum(seconds[part] for part in "bcdefh") + start <= 60 * device.MINUTES["rest"] < 600


def test_items_have_names_of_their_own() -> None:
    for smoke, kind in ((True, "cpu"), (False, "cuda")):
        keys = [item.key for item in plan.all_items(90, kind, smoke)]
        assert len(keys) == len(set(keys)) > 40


def test_contestants_exist_and_the_most_telling_come_first() -> None:
    assert {name for name, _ in steps.WAYS} <= TRAINEES.keys() and {name for name, _ in steps.COMPILED} <= TRAINEES.keys()
    assert [item.about["contestant"] for item in layers.items("b", (50432,), 90, "cuda", False)[:3]] == [
        "frozen", "fastlora triton", "fastlora eager"
    ]  # fmt: skip
    table = [item.name for item in canary.items(90, "cuda", False) if item.name.startswith("table")]
    assert all("r2 " in name and "bfloat16 half" in name for name in table[:2]) and {"50432", "6304"} <= {
        found[1] for name in table if (found := re.search(r", (\d+) rows", name))
    }


def test_the_captured_step_is_compiled_at_its_own_sizes() -> None:
    model: Any = mini.build()
    made = step_check._loop(torch.device("cpu"), None, 3, 8)
    rows = int((made._step.objective._prompts.tokens.argmax(1) + 1).sum())
    image, text = len(model.visual.positional_embedding), model.positional_embedding.shape[1]
    width = model.visual.positional_embedding.shape[1]
    found = {(needed.arguments[0].rows, needed.arguments[0].width) for needed in canary._mini_step(90)}
    assert found == {(8 * image, width), (8, width), (rows, text), (step_check.CLASSES, text)}


def test_a_steps_gate_is_compiled_at_the_rows_of_its_draws() -> None:
    """Prompts end at their last token; a program takes 32 rows, so that one and two programs are all that there is."""
    tokenize = open_clip.get_tokenizer("ViT-B-16-quickgelu")

    def rows(classes: int, draw: int) -> int:
        return int((tokenize(few_prompts(Job(steps.MODEL, classes=classes), draw)).argmax(1) + 1).sum())

    draws = [rows(FEW, draw) for draw in range(DRAWS)]
    assert {math.ceil(n / 32) for n in draws} == {math.ceil(n / 32) for n in (31, 37)} == {1, 2} and rows(2, 0) == 21
    for name in ("fastlora", "fastlora, share_prefix"):
        found = [needed.arguments[0].rows for needed in steps._needed(Job(steps.MODEL, classes=10), name, 90)]
        assert {31, 37, 21 if name == "fastlora" else 16} <= set(found)


def test_contribution_guide_has_the_plan() -> None:
    """The table of what each part is expected to take; it compiles nothing, but wants Triton itself."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "device.py"), "--plan"],
        capture_output=True,
        text=True,
        env=without_interpreter(),
        timeout=HANG,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (BENCHMARKS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_only_files_with_gpu_tests_are_collected() -> None:
    found = suite.files()
    assert "tests/test_kernels.py" in found and "tests/test_cli.py" not in found
    assert "tests/test_device_plan.py" not in found


class Left:
    """As much of a Run as the tests' part asks for."""

    def left(self) -> float:
        return HANG


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
    (tmp_path / "tests" / "test_z.py").write_text("import a_library_that_is_not_here\npytestmark = pytest.mark.gpu\n")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "WORKERS", 1)

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

    monkeypatch.setattr(suite.subprocess, "Popen", Limited)
    here: Any = Left()
    (row,) = suite.run_tests("gpu", 7.0, here)
    assert (row["counts"]["passed"], row["counts"]["failed"], row["ending"]) == (
        1,
        1,
        "stopped at the limit",
    ) and "refused" in row
    assert "assert 1 == 2" in row["output"] and "test_y" not in row["output"]
    stat = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    wait(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")
    (tmp_path / "tests" / "test_x.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_right(): pass\n")
    (tmp_path / "tests" / "test_z.py").unlink()
    (row,) = suite.run_tests("gpu", HANG, here)
    assert row["counts"]["passed"] == 1 and "refused" not in row
