"""Attention over packed rows and the packing itself, on every kernel: those of a GPU stand in as their documented meaning.

xformers' masks are its own; tests/test_encoders_xformers.py asks the real package whether it takes what we hand over.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_support import CASES, HEADS, bounds, make, reference, reference_pooled, stand_in
from fastlora.encoders import attention, packing
from fastlora.encoders.packing import Sequences
from fastlora.testing import assert_within_budget

WIDTH = 16


@pytest.fixture(params=["cpu", "sdpa", "varlen", "xformers"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kernel in turn, chosen for every tensor."""
    if request.param in ("varlen", "xformers"):
        stand_in(monkeypatch, request.param)
    monkeypatch.setattr(attention, "kernel", lambda x: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sequences", CASES.values(), ids=CASES)
def test_attend(sequences: Sequences, chosen: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = sequences.prefix + sequences.body + sequences.readers
    qkv, dy = torch.randn(rows, 3 * WIDTH).to(dtype), torch.randn(rows, WIDTH).to(dtype)

    def run(of: torch.dtype, ours: bool) -> dict[str, Tensor]:
        x = qkv.to(of, copy=True).requires_grad_()
        y = attention.attend(x, HEADS, sequences) if ours else reference(x, sequences)
        (dx,) = torch.autograd.grad(y, x, dy.to(of))
        return {"y": y.detach(), **{f"d{n}": g for n, g in zip("qkv", dx.chunk(3, 1), strict=True)}}

    assert_within_budget(run(dtype, True), run(dtype, False), run(torch.float64, False), dtype)


@pytest.mark.parametrize(
    "sequences", [s for s in CASES.values() if not s.readers], ids=[n for n in CASES if "readers" not in n]
)
def test_attend_pooled(sequences: Sequences, chosen: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(sequences.count, WIDTH, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(sequences.prefix + sequences.body, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    got, want = attention.attend_pooled(q, kv, HEADS, sequences), reference_pooled(q, kv, sequences)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    dy = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, (q, kv), dy), torch.autograd.grad(want, (q, kv), dy), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=4),
    prefix=st.integers(0, 3),
    readers=st.booleans(),
)
def test_any_sequences_on_the_cpu(runs: list[tuple[int, int]], prefix: int, readers: bool) -> None:
    sequences = make(tuple(runs), True, prefix, readers)
    rows = prefix + sequences.body + sequences.readers
    qkv = torch.randn(rows, 3 * WIDTH, dtype=torch.float64, requires_grad=True)
    got, want = attention.attend(qkv, HEADS, sequences), reference(qkv, sequences)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-10)
    dy = torch.randn_like(want)
    (one,), (other,) = (torch.autograd.grad(y, qkv, dy) for y in (got, want))
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def test_odd_heads_go_where_the_kernel_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention wants a head that is a multiple of 8."""
    monkeypatch.setattr(attention, "kernel", lambda x: "varlen")
    monkeypatch.setattr(attention, "_varlen", lambda *_: pytest.fail("a head of 6 went to varlen"))
    sequences = CASES["prompts"]
    qkv = torch.randn(sequences.body, 3 * 12, dtype=torch.float64)
    torch.testing.assert_close(attention.attend(qkv, HEADS, sequences), reference(qkv, sequences))


def test_which_kernel() -> None:
    assert attention.kernel(torch.empty(0)) == "cpu"
    assert attention.kernel(torch.empty(0, device="meta")) == "sdpa"


class TestPacking:
    @settings(max_examples=60, deadline=None)
    @given(lengths=st.lists(st.integers(3, 9), min_size=1, max_size=7), prefix=st.integers(0, 2), reader=st.booleans())
    def test_every_row_is_who_it_says(self, lengths: list[int], prefix: int, reader: bool) -> None:
        n, context = len(lengths), 12
        tokens = torch.arange(n * 10).view(n, 10) + 1
        tokens[:, :prefix] = tokens[0, :prefix].clone()
        ids = torch.randperm(n) + 5
        packed = packing.pack(
            tokens, torch.tensor(lengths), ids, context=context, causal=True, prefix=prefix, reader=10 if reader else None
        )
        sequences = packed.sequences
        assert len(packed.rows) == prefix + sum(lengths) - n * prefix + n * reader
        assert packed.rows[:prefix].tolist() == list(range(prefix))
        own = {int(r): (int(t), int(p)) for r, t, p in zip(packed.rows, packed.tokens, packed.positions, strict=True)}
        for row, (identity, length) in enumerate(zip(ids.tolist(), lengths, strict=True)):
            for position in range(prefix, length):
                assert own[identity * context + position] == (int(tokens[row, position]), position)
            place = int(packed.order[row])
            pooled = int(packed.pooled[place])
            assert int(packed.rows[pooled]) == identity * context + (10 if reader else length - 1)
            start, end = bounds(sequences)[place]
            assert end - start == length - prefix
            assert packed.positions[start:end].tolist() == list(range(prefix, length))
        assert sequences.offsets is not None
        assert [e - s for s, e in bounds(sequences)] == sequences.offsets.diff().tolist()

    def test_equal_lengths_are_one_run(self) -> None:
        packed = packing.pack(
            torch.ones(5, 9, dtype=torch.long), torch.tensor([4, 2, 4, 2, 3]), torch.arange(5), context=9, causal=True
        )
        assert packed.sequences.runs == ((2, 2), (1, 3), (2, 4))

    @pytest.mark.parametrize(
        ("rows", "lengths", "prefix"),
        [
            ([[1, 2, 3, 4], [1, 2, 5, 4]], [4, 4], 2),
            ([[1, 2, 3, 0], [1, 2, 3, 0]], [3, 3], 2),
            ([[1, 2, 3, 0], [9, 2, 3, 0]], [3, 3], 0),
            ([[1, 2, 3, 0]], [3], 0),
        ],
        ids=["two in common", "one of its own is left", "none in common", "one prompt"],
    )
    def test_shared_prefix(self, rows: list[list[int]], lengths: list[int], prefix: int) -> None:
        assert packing.shared_prefix(torch.tensor(rows), torch.tensor(lengths)) == prefix
