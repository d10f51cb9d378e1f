"""The kernels through Triton's real compiler, for GPUs that are not here: the interpreter accepts code that it rejects."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.kernels import machine_code
from fastlora.kernels.machine_code import Report
from waiting import HANG

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
    for launch in sum(compile.launches(config, plan), []):
        print(name, launch.kernel.__name__, compile.compile_launch(launch, 90).registers)
"""
COMPILE_ONES = """
import torch
from kernels_support import ONE_PASS, TWO_PASSES
from fastlora.kernels import compile, tiles
config = compile.Config(tiles.Call(90, "half", 16, True), torch.bfloat16, (True,), width=1, rows=1, rank=1)
for plan in (ONE_PASS, TWO_PASSES):
    for launch in sum(compile.launches(config, plan), []):
        print(launch.kernel.__name__, compile.compile_launch(launch, 90).registers)
"""
# The table with a forward tile that no row has; the arguments are its numbers. Then the command itself, on that forward alone.
COMPILE_BAD_TABLE = """
import dataclasses, sys
from fastlora.kernels import compile, tiles
tile = tiles.Tile(*map(int, sys.argv[1:]))
plans = [dataclasses.replace(row, plan=dataclasses.replace(row.plan, forward=tile)) for row in tiles.TABLE]
tiles.TABLE = tuple(plans)
jobs = compile.jobs
forward = lambda job: job.launch.kernel.__name__ == "forward_kernel"
compile.jobs = lambda configs, every: filter(forward, jobs(configs[:1], every))
sys.exit(compile.main(["--arch", "90", "--precision", "half", "--rank", "16", "--jobs", "1"]))
"""
COMPILE_NO_PRODUCT = """
import torch, triton, triton.language as tl
from fastlora.kernels import compile
from fastlora.kernels.launch import Launch
from no_product import no_product
x = torch.empty(32, 32, dtype=torch.bfloat16, device="meta")
report = compile.compile_launch(Launch(no_product, 1, {"x_ptr": x, "BLOCK": 32}, 4, 1), 90)
print(report.problems(90, uses_tensor_cores=True, measured=False))
"""
GOOD = Report(
    registers=200, stack=0, shared=1000, mma=8, wgmma=8, cpu_seconds=1.0, spills_in_loops=0, serialised="", loop=10.0, load=16,
    races=[],
)  # fmt: skip
LOOP = """
.L_x_1:
        /*0100*/                   LDGSTS.E.BYPASS.128 [R208+0x18000], desc[UR18][R26.64], !P2 ;
        /*0110*/                   LDG.E.U16 R2, desc[UR18][R26.64] ;
        /*0120*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0140*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0150*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0160*/              @P0  BRA `(.L_x_1) ;
.L_x_2:
        /*0170*/                   LDL R1, [R2] ;
        /*0180*/              @P0  BRA `(.L_x_2) ;
"""


def run_compiler(code: str, *arguments: str, status: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True, text=True, env=environment, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_rows_of_the_table_compile_without_spills_or_serialised_wgmma() -> None:
    """Hopper's rows for small ranks in half precision; `make kernels` compiles the whole table."""
    said = run_compiler(COMPILE_TABLE, "--arch", "90", "--precision", "half", "--rank", "16")
    assert "0 with problems" in said


@pytest.mark.slow
def test_plans_that_the_interpreter_runs_compile_too() -> None:
    said = run_compiler(COMPILE_TEST_PLANS)
    for kernel in (
        "one-pass forward_kernel",
        "one-pass backward_kernel",
        "two-passes shrink_kernel",
        "group-by-group da_kernel",
    ):
        assert kernel in said


@pytest.mark.slow
def test_sizes_of_one_compile_too() -> None:
    """One row, column and rank: numbers that the interpreter is given are constants for the compiler."""
    said = run_compiler(COMPILE_ONES)
    assert {line.split()[0] for line in said.splitlines()} == {
        "pack_kernel", "shrink_kernel", "forward_kernel", "ds_db_kernel", "backward_kernel", "da_kernel", "reduce_kernel"
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tile", "problems"),
    [
        ("128 256 64 4 3", ["local loads or stores inside an MMA loop", "wgmma serialised", "bytes of stack and no measured"]),
        ("128 256 64 8 8", ["397312 bytes of shared memory, sm_90 has 232448"]),
    ],
    ids=["too-few-warps", "too-many-stages"],
)
def test_a_tile_that_must_not_be_used_fails_the_command(tile: str, problems: list[str]) -> None:
    said = " ".join(run_compiler(COMPILE_BAD_TABLE, *tile.split(), status=1).split())
    assert "1 kernels compiled, 1 with problems" in said
    # a cell of the table is wrapped at any blank
    assert all(set(problem.split()) <= set(said.split()) for problem in problems)


def test_a_kernel_without_tensor_cores_is_found_out() -> None:
    assert "tensor cores lost" in run_compiler(COMPILE_NO_PRODUCT)


def test_each_rule_of_a_report_alone() -> None:
    assert GOOD.problems(90, True, False) == []
    for change, words in (
        ({"spills_in_loops": 3}, "3 local loads or stores inside an MMA loop"),
        ({"serialised": "a loop waits after each wgmma"}, "waits after each wgmma"),
        ({"shared": 100 * 1024}, "102400 bytes of shared memory, sm_80 has 101376"),
        ({"mma": 0}, "tensor cores lost"),
        ({"stack": 72}, "72 bytes of stack and no measured time"),
        ({"races": ["%dy is written at backward.py:45"]}, "race: %dy is written at backward.py:45"),
    ):
        (problem,) = dataclasses.replace(GOOD, **change).problems(80, True, False)  # type: ignore[arg-type]
        assert words in problem
    assert dataclasses.replace(GOOD, stack=72).problems(80, True, measured=True) == []
    assert dataclasses.replace(GOOD, mma=0).problems(80, False, False) == []


def test_a_disassembly_is_read() -> None:
    loops = machine_code._loops(LOOP)
    assert [len(loop) for loop in loops] == [8, 3]
    assert machine_code._serialised("", loops) == "a loop waits after each wgmma"
    assert machine_code._per_product(loops) == 3.5 and machine_code._narrowest_load(loops) == 2
    said = "Potential Performance Loss: wgmma.mma_async instructions are serialized due to a branch in the function 'f'"
    assert machine_code._serialised(said, []) == "wgmma serialised due to a branch"
