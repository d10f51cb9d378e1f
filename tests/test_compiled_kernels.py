"""The kernels through Triton's real compiler, for GPUs that are not here: the interpreter accepts code that it rejects."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The interpreter is chosen when Triton is imported, so what compiles runs in a process without it.
COMPILE_TABLE = """
import sys
from fastlora.kernels import compile
sys.exit(compile.main(sys.argv[1:]))
"""
COMPILE_TEST_PLANS = """
import torch
from kernels_support import PLANS
from fastlora.kernels import compile, tiles
config = compile.Config(tiles.Call(90, "half", 16, True), torch.float16, (True, False, True), width=133)
for name, plan in PLANS.items():
    for launch in compile.launches(config, plan):
        report = compile.compile_launch(launch, 90)
        print(name, report.kernel, report.registers)
"""


def run_compiler(code: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_rows_of_the_table_compile_without_spills_or_serialised_wgmma() -> None:
    """Hopper's rows for small ranks in half precision; `make kernels` compiles the whole table."""
    said = run_compiler(COMPILE_TABLE, "--arch", "90", "--precision", "half", "--rank", "16")
    assert "with problems" in said


@pytest.mark.slow
def test_plans_that_the_interpreter_runs_compile_too() -> None:
    assert "backward_kernel" in run_compiler(COMPILE_TEST_PLANS)
