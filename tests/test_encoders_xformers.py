"""The real xformers: its masks say what `Sequences` says, and its operators take what we hand over.

Its kernels need a GPU. On a CPU its masks are made dense, and its operators asked what they refuse; for GPUs that are not here
its dispatch runs on fake tensors, which have a device and a shape but no numbers.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_support import CASES, NO_WHEEL, make, reads
from fastlora.encoders import attention
from fastlora.encoders.packing import Sequences
from waiting import HANG

ops = pytest.importorskip("xformers.ops", reason=NO_WHEEL)
fmha = ops.fmha

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
HEAD = pytest.mark.parametrize("head", [64, 32])  # of CLIP's towers, and of small ones
POOLED = pytest.mark.parametrize("pooled", [False, True], ids=["rows", "pooled"])
OPERATORS = [fmha.cutlass.FwOp, fmha.cutlass.BwOp, fmha.flash.FwOp, fmha.flash.BwOp]  # torch's own kernels behind them
PACKED = {name: case for name, case in CASES.items() if name != "images"}  # equally long rows need no mask: torch serves
TURING, AMPERE, HOPPER = (7, 5), (8, 0), (9, 0)


def check_mask(sequences: Sequences, pooled: bool) -> None:
    """Each query's row of xformers' mask has 0 once for every row that it reads, in the place of that row's key, else -inf."""
    first, end = sequences.prefix, sequences.prefix + sequences.body
    with_readers = make(sequences.runs, sequences.causal, first, True)
    queries = slice(end, None) if pooled else slice(first, end)
    want = reads(with_readers)[queries, :end].long()
    row = torch.arange(end)[:, None]
    keys, starts, longest = attention._with_prefix(row[first:], row[:first] if first else None, sequences)
    mask = attention._block_mask(sequences, first, pooled, CPU)
    dense = mask.materialize((len(want), len(keys)))
    assert torch.equal(dense, torch.where(dense == 0, 0.0, -torch.inf))
    assert torch.equal((dense == 0).long() @ (keys == row.T).long(), want)
    for info, offsets, most in ((mask.k_seqinfo, starts, longest), (mask.q_seqinfo, *_q_offsets(sequences, pooled))):
        assert info.seqstart.dtype == torch.int32 and info.seqstart.tolist() == offsets.tolist()
        assert info.max_seqlen == most


def _q_offsets(sequences: Sequences, pooled: bool) -> tuple[Tensor, int]:
    assert sequences.offsets is not None
    return (torch.arange(sequences.count + 1), 1) if pooled else (sequences.offsets, sequences.longest)


@POOLED
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES)
def test_mask(sequences: Sequences, causal: bool, pooled: bool) -> None:
    check_mask(make(sequences.runs, causal, sequences.prefix, False), pooled)


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4),
    causal=st.booleans(),
    prefix=st.integers(0, 3),
    pooled=st.booleans(),
)
def test_any_mask(runs: list[tuple[int, int]], causal: bool, prefix: int, pooled: bool) -> None:
    check_mask(make(tuple(runs), causal, prefix, False), pooled)


def test_one_mask_for_all_layers_as_long_as_the_sequences_live() -> None:
    """A captured CUDA graph reads the mask's offsets at each replay: other prompts between must not free them."""
    sequences = make(((2, 3), (1, 5)), True, 0, False)
    mask = attention._block_mask(sequences, 0, False, CPU)
    for n in range(1, 100):
        attention._block_mask(make(((1, 1), (n, 2)), True, 0, False), 0, False, CPU)
    assert attention._block_mask(sequences, 0, False, CPU) is mask
    assert attention._block_mask(sequences, 0, True, CPU) is not mask


def hand_over(sequences: Sequences, head: int, dtype: torch.dtype, device: torch.device, pooled: bool) -> list[Any]:
    """The Inputs of every call of memory_efficient_attention that our attention of such rows makes."""
    calls: list[Any] = []

    def record(*args: Any, **named: Any) -> Tensor:
        calls.append(fmha.Inputs(*args, **named))
        return torch.empty_like(calls[-1].query)

    rows, width = sequences.prefix + sequences.body + sequences.readers, 3 * head
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "memory_efficient_attention", record)
        patch.setattr(attention, "kernel", lambda x: "xformers")
        x = torch.empty(rows, 3 * width, dtype=dtype, device=device)
        if pooled:
            attention.attend_pooled(x[: sequences.count, :width], x[: rows - sequences.readers, width:], 3, sequences)
        else:
            attention.attend(x, 3, sequences)
    return calls


@HEAD
@HALVES
@POOLED
@pytest.mark.parametrize("sequences", PACKED.values(), ids=PACKED)
def test_operators_refuse_nothing_but_the_cpu(sequences: Sequences, pooled: bool, dtype: torch.dtype, head: int) -> None:
    calls = hand_over(sequences, head, dtype, CPU, pooled)
    assert len(calls) == 1 + (sequences.readers > 0 and not pooled)
    for inputs in calls:
        inputs.validate_inputs()
        for operator in OPERATORS:
            device, *more = operator.not_supported_reasons(inputs)
            assert device.startswith("device=cpu"), operator.NAME
            assert more == ["bf16 is only supported on A100+ GPUs"] * (dtype is torch.bfloat16), operator.NAME


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """A GPU of that capability in name: fake tensors live on it, and xformers was built for it, or not."""

    def appear(capability: tuple[int, int], built: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(fmha.common, "_built_with_cuda", built)

    def moved(seq: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.tensor(seq, dtype=dtype).to(device)

    def backward(*args: Any, philox_seed: Tensor, philox_offset: Tensor, **named: Any) -> Any:
        return cutlass(*args, philox_seed=philox_seed.to(GPU), philox_offset=philox_offset.to(GPU), **named)

    # two things that only a real GPU stands: host memory pinned on the way there, and a seed on the CPU that no dropout reads
    monkeypatch.setattr(fmha.attn_bias, "_to_device_tensor", moved)
    cutlass = fmha.cutlass.BwOp.OPERATOR
    monkeypatch.setattr(fmha.cutlass.BwOp, "OPERATOR", backward)
    attention._gpu_kernel.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield appear
    attention._gpu_kernel.cache_clear()


def on_gpu(sequences: Sequences) -> Sequences:
    assert sequences.offsets is not None
    return dataclasses.replace(sequences, offsets=sequences.offsets.to(GPU), masks={})


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "want"),
    [
        (TURING, True, torch.float16, "xformers"),
        (TURING, True, torch.bfloat16, "sdpa"),
        (TURING, False, torch.float16, "sdpa"),
        (AMPERE, True, torch.bfloat16, "varlen"),
    ],
    ids=["sm_75", "sm_75 has no bf16", "built for another CUDA", "sm_80 has varlen"],
)
def test_kernel(gpu: Callable[..., None], capability: tuple[int, int], built: bool, dtype: torch.dtype, want: str) -> None:
    """xformers serves where it runs, which is not everywhere that it is installed."""
    gpu(capability, built)
    assert attention.kernel(torch.empty(0, dtype=dtype, device=GPU)) == want


def test_kernel_without_a_backward(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is kept, so it holds for training though it was asked for without gradients."""
    gpu(TURING)
    monkeypatch.setattr(fmha.cutlass.BwOp, "SUPPORTED_DTYPES", set())
    with torch.inference_mode():
        assert attention.kernel(torch.empty(0, dtype=torch.float16, device=GPU)) == "sdpa"


def test_kernel_without_an_xformers_that_imports(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises ImportError beside a flash-attn that it does not know."""
    gpu(TURING)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert attention.kernel(torch.empty(0, dtype=torch.float16, device=GPU)) == "sdpa"


@HEAD
@POOLED
@pytest.mark.parametrize(
    ("capability", "dtype", "operator"),
    [(TURING, torch.float16, "cutlassF"), (AMPERE, torch.bfloat16, "fa2F"), (HOPPER, torch.float16, "fa2F")],
    ids=["sm_75", "sm_80", "sm_90"],
)
@pytest.mark.parametrize("sequences", PACKED.values(), ids=PACKED)
def test_dispatch(
    gpu: Callable[..., None], sequences: Sequences, capability: tuple[int, int], dtype: torch.dtype, operator: str,
    pooled: bool, head: int,
) -> None:  # fmt: skip
    """Forward and backward as xformers runs them, down to the shapes that torch's kernels return."""
    gpu(capability)
    for inputs in hand_over(on_gpu(sequences), head, dtype, GPU, pooled):
        q, k, v, mask = inputs.query, inputs.key, inputs.value, inputs.attn_bias
        assert fmha._dispatch_fw(inputs, True).NAME.startswith(operator)
        out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
        assert (out.shape, out.dtype, out.device) == (q.shape, dtype, GPU)
        gradients = fmha.memory_efficient_attention_backward(torch.empty_like(out), out, lse, q, k, v, mask)
        assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def test_encoders_on_a_cpu_leave_it_alone() -> None:
    """Importing it takes seconds, and it logs a line where its kernels are for another CUDA than torch's."""
    code = (
        "import sys, torch, fastlora, fastlora.mini\n"
        "model = fastlora.mini.build()\n"
        "tokens = torch.tensor([[1] * (model.context_length - 1) + [2]] * 2)\n"
        "fastlora.encode_text(model, tokens), fastlora.encode_image(model, torch.rand(2, 3, *model.visual.image_size))\n"
        "print('xformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=HANG)
    assert (done.stdout, done.stderr) == ("False\n", "")
