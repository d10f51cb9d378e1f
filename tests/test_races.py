"""The rule that shuts races out, on Triton's IR as text and on kernels that race on purpose, compiled without a GPU."""

from __future__ import annotations

import importlib.metadata

import pytest

from fastlora.kernels.races import races
from test_compiled_kernels import run_compiler

# A loop as Triton pipelines one for Hopper, written by hand: {buffers} of x and w, two tiles copied ahead.
HOPPER = """
module attributes {{"ttg.num-warps" = 8 : i32}} {{
  tt.func public @kernel(%K: i32) attributes {{noinline = false}} {{
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %c-1_i32 = arith.constant -1 : i32 loc(#loc1)
    %n = arith.constant {buffers} : i32 loc(#loc1)
    %x = ttg.local_alloc : () -> !ring loc(#loc2)
    %x0 = ttg.memdesc_index %x[%c0_i32] : !ring -> !tile loc(#loc2)
    %t0 = ttg.async_copy_global_to_local %p, %x0 : !ptrs -> !tile loc(#loc2)
    %x1 = ttg.memdesc_index %x[%c1_i32] : !ring -> !tile loc(#loc2)
    %t1 = ttg.async_copy_global_to_local %p, %x1 : !ptrs -> !tile loc(#loc2)
    %r:3 = scf.for %k = %c0_i32 to %K step %one iter_args(%acc = %z, %put = %c1_i32, %take = %c-1_i32) -> (!acc, i32, i32) {{
      %a = arith.addi %take, %c1_i32 : i32 loc(#loc3)
      %b = arith.cmpi sge, %a, %n : i32 loc(#loc3)
      %read = arith.select %b, %c0_i32, %a : i32 loc(#loc3)
      %xv = ttg.memdesc_index %x[%read] : !ring -> !tile loc(#loc2)
      %d = ttng.warp_group_dot %xv, %wv, %acc {{inputPrecision = 0 : i32, isAsync = true}} : !tile loc(#loc3)
      %e:2 = ttng.warp_group_dot_wait %d, %xv {{pendings = {pending} : i32}} : !acc, !tile loc(#loc3)
      %f = arith.addi %put, %c1_i32 : i32 loc(#loc3)
      %g = arith.cmpi sge, %f, %n : i32 loc(#loc3)
      %write = arith.select %g, %c0_i32, %f : i32 loc(#loc3)
      %xw = ttg.memdesc_index %x[%write] : !ring -> !tile loc(#loc2)
      %t2 = ttg.async_copy_global_to_local %p, %xw : !ptrs -> !tile loc(#loc2)
      scf.yield %e#0, %write, %read : !acc, i32, i32 loc(#loc3)
    }} loc(#loc3)
    tt.return loc(#loc1)
  }} loc(#loc1)
}} loc(#loc1)
#loc1 = loc("/home/a/kernel.py":1:0)
#loc2 = loc("/home/a/kernel.py":20:8)
#loc4 = loc("/home/a/kernel.py":30:8)
#loc3 = loc("acc"(#loc4))
"""
RACING = """
import sys, torch
from racing import loaded_twice, shared_by_two
from fastlora.kernels import compile
from fastlora.kernels.launch import Launch
for kernel in (shared_by_two, loaded_twice):
    x, y = (torch.empty(128, 512, dtype=torch.bfloat16, device="meta") for _ in range(2))
    arguments = {"x_ptr": x, "w_ptr": y, "a_ptr": x, "y_ptr": y, "s_ptr": y, "K": 512}
    report = compile.compile_launch(Launch(kernel, 1, arguments, 8, 3), 90)
    print(kernel.__name__, bool(report.races), report.problems(90, True, False))
"""
# The rows' kernels for Blackwell, as they are and with the waits for their products taken out.
BLACKWELL = """
import torch, triton
from triton.backends.compiler import GPUTarget
from fastlora.kernels import compile, tiles
from fastlora.kernels.races import races
config = compile.Config(tiles.Call(100, "half", 16, False), torch.bfloat16)
for launch in sum(compile.launches(config), []):
    if launch.kernel.__name__ in ("forward_kernel", "backward_kernel"):
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        text = triton.compile(compile.ast_source(launch), target=GPUTarget("cuda", 100, 32), options=options).asm["ttgir"]
        assert "tc_gen5_mma" in text
        without = "\\n".join(line for line in text.splitlines() if "ttng.wait_barrier" not in line)
        print(launch.kernel.__name__, len(races(text)), len(races(without)) > 0)
"""


@pytest.mark.parametrize(
    ("buffers", "pending", "races_found"),
    [(3, 1, False), (2, 1, True), (2, 0, False), (3, 2, True), (4, 2, False)],
)
def test_a_copy_into_what_a_product_reads_is_found(buffers: int, pending: int, races_found: bool) -> None:
    """Two tiles ahead and so many products in flight need as many buffers as both together."""
    found = races(HOPPER.format(buffers=buffers, pending=pending))
    assert found == (["%x is written at kernel.py:20 while kernel.py:30 reads it"] if races_found else [])


def test_an_index_that_cannot_be_followed_is_no_proof() -> None:
    text = HOPPER.format(buffers=3, pending=1).replace("arith.constant -1", "tt.get_program_id x")
    assert races(text) == ["%x may be written at kernel.py:20 while kernel.py:30 reads it"]


@pytest.mark.parametrize(
    ("known", "unknown"),
    [
        ("%xw = ttg.memdesc_index %x[%write]", "%xw = ttg.memdesc_index %elsewhere[%write]"),
        ("%xw = ttg.memdesc_index %x[%write]", "%xw = arith.select %elsewhere, %x0, %x1"),
        ("ttg.async_copy_global_to_local %p, %xw", "ttng.async_tma_gather %desc[%rows, %c0_i32] %elsewhere, %barrier, %true"),
    ],
    ids=["ring", "buffer", "gather"],
)
def test_a_buffer_that_cannot_be_followed_is_no_proof(known: str, unknown: str) -> None:
    text = HOPPER.format(buffers=3, pending=1)
    assert known in text
    assert races(text.replace(known, unknown)) == ["where kernel.py:20 writes cannot be followed"]


def test_a_product_of_what_cannot_be_followed_is_no_proof() -> None:
    text = HOPPER.format(buffers=3, pending=1)
    text = text.replace("isAsync = true} : !tile", "isAsync = true} : !tile<#smem>, !tile<#smem>")
    assert races(text) == ["what kernel.py:30 reads cannot be followed"]


def test_a_synchronous_product_is_not_in_flight() -> None:
    assert races(HOPPER.format(buffers=2, pending=1).replace("isAsync = true", "isAsync = false")) == []


@pytest.mark.slow
def test_tritons_missing_buffer_is_found_and_a_load_of_its_own_mends_it() -> None:
    """Issue 6691: a wgmma and a product of another kind read one load."""
    shared, twice = run_compiler(RACING).splitlines()
    assert twice == "loaded_twice False []"
    # a later Triton may have mended it
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) <= (3, 9):
        assert shared.startswith("shared_by_two True ['race: ")


@pytest.mark.slow
def test_blackwells_products_are_waited_for() -> None:
    assert run_compiler(BLACKWELL).splitlines() == ["forward_kernel 0 True", "backward_kernel 0 True"]
