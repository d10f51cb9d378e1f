"""The checks of benchmarks/gpu/ on a GPU at CLIP's sizes: the table's rows and forms, the mask, graphs, attention, a step."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastlora import verdicts
from fastlora.fastest import words
from fastlora.kernels import lora_linear as kernels
from fastlora.kernels import tiles
from fastlora.testing import CLIP_SHAPES
from gpu.attention_checks import attention, missing
from gpu.checks import forms, judged, mask_bits, products, replays, table_rows, verdict
from gpu.step_check import captured_step
from kernels_support import DEVICE, Case, check, make, run
from waiting import HANG

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
M, K = 6304, 768  # 32 images of ViT-B-16
# The same classes on every architecture, so that their names can be had without a GPU.
CLASSES = [row.name for row in table_rows(torch.device("cpu"), M, K)]
ARCH = tiles.architecture(torch.device(DEVICE))
FORMS = [(p, plan) for p in (0.25, 0.0) for plan in forms(tiles.Call(ARCH, "half", 16, p > 0))]
PRECISIONS: list[tuple[torch.dtype, tiles.Precision]] = [
    (torch.bfloat16, "half"), (torch.float16, "half"), (torch.float32, "tf32"), (torch.float32, "ieee"),
]  # fmt: skip


def _form(plan: tiles.Plan) -> str:
    light = ", ".join(str(tile) for tile in (plan.shrink, plan.ds_db, plan.da))
    apart = "" if plan.groups_together else ", groups apart"
    return f"{words(plan, 'forward')} {words(plan, 'backward')} {light}{apart}"


@pytest.mark.parametrize("name", CLASSES)
def test_clip_shapes_with_the_tables_rows(name: str) -> None:
    row = table_rows(GPU, M, K)[CLASSES.index(name)]
    for call in row.calls():
        found = judged(call, verdicts.book(GPU))
        assert found.right, found


@pytest.mark.parametrize("shape", ["ViT-L-14", "text"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_default_recipe_against_the_reference(dropout: float, shape: str) -> None:
    """Rank 2 in bfloat16 at the other CLIP widths, rows with identities; the truth is not eager's but the equations'."""
    k, m = CLIP_SHAPES[shape]
    check(make(Case(m=m, n=k, k=k, r=2, dropout=dropout), torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize(("dropout", "plan"), FORMS, ids=[f"p={p} {_form(plan)}" for p, plan in FORMS])
def test_every_form_with_real_tiles(dropout: float, plan: tiles.Plan) -> None:
    (row,) = table_rows(GPU, M, K, dtypes=[torch.bfloat16], ranks=[16], dropouts=[dropout])
    for call in row.calls():
        found = verdict(call, verdicts.book(GPU), plan)
        assert found.right, f"{_form(plan)}: {call.kind}: {found.what}"
    if dropout:
        for identities in (True, False):
            mask_bits(GPU, M, K, plan=plan, identities=identities)


@pytest.mark.parametrize("identities", [True, False], ids=["identities", "row numbers"])
@pytest.mark.parametrize("dropout", [0.25, 0.1])
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=lambda v: str(v).removeprefix("torch."))
def test_every_bit_of_the_mask(dtype: torch.dtype, precision: tiles.Precision, dropout: float, identities: bool) -> None:
    with products(precision):
        mask_bits(GPU, M, K, dtype=dtype, dropout=dropout, identities=identities)


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=lambda v: str(v).removeprefix("torch."))
def test_every_replay_of_a_graph_is_a_plain_call(dtype: torch.dtype, precision: tiles.Precision) -> None:
    with products(precision):
        replays(GPU, M, K, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kernel", ["varlen", "xformers"])
def test_attention_over_packed_rows(kernel: str, dtype: torch.dtype) -> None:
    """With and without a shared prefix, pooled or not."""
    if why := missing(kernel, GPU):
        pytest.skip(why)
    attention(GPU, kernel, dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_captured_steps_are_those_of_the_eager_engine(dtype: torch.dtype | None) -> None:
    captured_step(GPU, dtype=dtype)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: kernels start on one that is not the current one")
def test_a_gpu_that_is_not_the_current_one() -> None:
    other = torch.device("cuda", 1)
    here = make(Case(m=M, n=K, k=K, r=16), torch.bfloat16)
    tensors = {name: value.to(other) for name, value in vars(here).items() if isinstance(value, torch.Tensor)}
    with tiles.assuming(100):  # as many slots on both, so that sums have one order
        want, got = run(kernels, here), run(kernels, dataclasses.replace(here, **tensors))
    assert torch.cuda.current_device() == 0
    for name, value in want.items():
        assert got[name].device == other and torch.equal(got[name].to(value.device), value), name
    mask_bits(other, M, K)


# Each in a process under the sanitizer: small tiles at odd shapes, and the table's own with two tiles of rows.
SANITIZED = {
    "small tiles": """
import torch
from kernels_support import PLANS, Case, make, run
from fastlora.kernels import lora_linear
for plan in (None, *PLANS.values()):
    for case in (Case(m=37), Case(m=70, n=33, k=136, r=17, active=(True, False, True), layout="columns")):
        run(lora_linear, make(case, torch.bfloat16), plan=plan)
torch.cuda.synchronize()
""",
    "the table's rows": """
import torch
from gpu.checks import products, table_rows
from kernels_support import Case, make, run
from fastlora.kernels import lora_linear, tiles
for row in table_rows(torch.device("cuda", 0), 1, 1, dtypes=(torch.bfloat16, torch.float32)):
    with products(row.precision):
        plan = tiles.choose(row.kind)
        tallest = max(tile.m for tile in (plan.forward, plan.backward, plan.shrink, plan.ds_db, plan.da))
        case = Case(m=2 * tallest, n=384, k=384, r=row.layer.rank, dropout=row.layer.spec.dropout)
        run(lora_linear, make(case, row.layer.dtype))
torch.cuda.synchronize()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("what", SANITIZED)
def test_no_access_outside_of_memory_and_no_race(what: str, tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests, tests.parent / "benchmarks")))
    # torch's allocator would hide an access beyond a tensor inside its own larger blocks
    environment = os.environ | {"PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-W", "ignore", "-c", SANITIZED[what]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG)
    if "not supported" in done.stdout:
        pytest.skip(f"compute-sanitizer does not work on this machine: {done.stdout[-300:]}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
