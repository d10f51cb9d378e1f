"""The compiled attention of short sequences: within the budget of fp64 on every width of vectors of this machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_support import CASES, HEADS, make, reference, reference_pooled
from fastlora import cpu
from fastlora.encoders import attention, short_attention
from fastlora.encoders.packing import Sequences
from fastlora.testing import assert_within_expected_budget, count_flops

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
DRAWS = 4
WIDTH = 64
ALL = {
    **{name: sequences for name, sequences in CASES.items() if not sequences.readers},
    "as many keys as are taken": make(((2, 64),), False, 0, False),
    "prefix longer than the sequences": make(((5, 3), (2, 17)), True, 21, False),
    "prefix, not causal": make(((3, 7),), False, 2, False),
    "many": make(((70, 9), (40, 12)), True, 0, False),
}
each_case = pytest.mark.parametrize("sequences", ALL.values(), ids=ALL)


def draw(number: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number))


def compared(inputs: list[list[Tensor]], ours: Any, plain: Any) -> None:
    """Outputs and gradients of `ours`, within the budget; each draw of inputs ends with the gradient of the output."""

    def run(of: Any, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        found = []
        for *values, dy in inputs:
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in values]
            y = of(*leaves)
            gradients = torch.autograd.grad(y, leaves, dy.to(dtype))
            parts = [part for g in gradients for part in g.split(WIDTH, 1)]
            found.append({"y": y.detach()} | {f"gradient {i}": part for i, part in enumerate(parts)})
        return found

    assert_within_expected_budget(run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64), torch.float32)


@each_case
def test_attend(lanes: int, sequences: Sequences) -> None:
    rows = sequences.prefix + sequences.body
    inputs = [[draw(i, rows, 3 * WIDTH), draw(-1 - i, rows, WIDTH)] for i in range(DRAWS)]
    compared(
        inputs, lambda qkv: short_attention.attend(qkv, HEADS, sequences), lambda qkv: reference(qkv, sequences)
    )  # fmt: skip


@each_case
def test_attend_pooled(lanes: int, sequences: Sequences) -> None:
    n, rows = sequences.count, sequences.prefix + sequences.body
    inputs = [[draw(i, n, WIDTH), draw(i + 50, rows, 2 * WIDTH), draw(-1 - i, n, WIDTH)] for i in range(DRAWS)]
    compared(
        inputs,
        lambda q, kv: short_attention.attend_pooled(q, kv, HEADS, sequences),
        lambda q, kv: reference_pooled(q, kv, sequences),
    )


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    prefix=st.integers(0, 20),
    causal=st.booleans(),
    threads=st.integers(1, 5),
)
def test_any_sequences(runs: list[tuple[int, int]], prefix: int, causal: bool, threads: int) -> None:
    sequences = make(tuple(runs), causal, prefix, False)
    qkv = draw(0, prefix + sequences.body, 3 * WIDTH).requires_grad_()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got, want = short_attention.attend(qkv, HEADS, sequences), reference(qkv, sequences)
    torch.testing.assert_close(got, want)
    dy = draw(1, *want.shape)
    (one,), (other,) = (torch.autograd.grad(y, qkv, dy) for y in (got, want))
    torch.set_num_threads(before)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_a_prefix_gets_of_many_sequences_errs_little(lanes: int) -> None:
    """A long sum, kept short: within the floor of the budget, without what torch's own sum may err."""
    sequences = make(((1500, 4),), True, 6, False)
    values, dy = draw(0, 6 + sequences.body, 3 * WIDTH), draw(1, 6 + sequences.body, WIDTH)

    def gradient(of: Any, dtype: torch.dtype) -> Tensor:
        qkv = values.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(of(qkv), qkv, dy.to(dtype))[0][: sequences.prefix].double()

    truth = gradient(lambda qkv: reference(qkv, sequences), torch.float64)
    got = gradient(lambda qkv: short_attention.attend(qkv, HEADS, sequences), torch.float32)
    assert (got - truth).abs().max() < 4 * torch.finfo(torch.float32).eps * truth.abs().max()


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_scores_of_any_size(lanes: int, size: float) -> None:
    """The largest score is taken off first: nothing overflows, and what is far below it is 0."""
    sequences = CASES["prompts"]
    qkv = draw(3, sequences.body, 3 * WIDTH)
    qkv[:, :WIDTH] *= size
    got, want = short_attention.attend(qkv, HEADS, sequences), reference(qkv.double(), sequences)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), want, atol=1e-2 if size > 1e3 else 1e-5, rtol=1e-4)


def test_a_nan_stays_in_its_sequence(lanes: int) -> None:
    sequences = make(((3, 5),), False, 0, False)
    qkv = draw(0, 15, 3 * WIDTH)
    qkv[7, 3] = math.nan
    bad = short_attention.attend(qkv, HEADS, sequences).isnan().any(1).tolist()
    assert bad == [i == 7 for i in range(15)]  # a query's NaN is its own
    qkv[7, WIDTH] = math.nan
    bad = short_attention.attend(qkv, HEADS, sequences).isnan().any(1).tolist()
    assert bad == [5 <= i < 10 for i in range(15)]


def test_strided_inputs_and_gradients() -> None:
    sequences = CASES["prompts"]
    qkv = draw(0, sequences.body, 3 * WIDTH)
    y = short_attention.attend(qkv, HEADS, sequences)
    dy = draw(1, *y.shape)

    def gradient(x: Tensor, dy: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(short_attention.attend(leaf, HEADS, sequences), leaf, dy)[0]

    for strided in (qkv.T.contiguous().T, torch.cat([qkv, qkv], 1)[:, : 3 * WIDTH]):
        assert torch.equal(short_attention.attend(strided, HEADS, sequences), y)
        assert torch.equal(gradient(strided, dy), gradient(qkv, dy))
    assert torch.equal(gradient(qkv, torch.ones(()).expand_as(y)), gradient(qkv, torch.ones_like(y)))  # as of a sum


def test_readers_are_strided_parts_of_one_tensor() -> None:
    """Their queries, and the keys and values they read, are views of q, k, v of all rows."""
    sequences = CASES["readers, shared prefix"]
    rows = sequences.prefix + sequences.body + sequences.readers
    inputs = [[draw(i, rows, 3 * WIDTH), draw(-1 - i, rows, WIDTH)] for i in range(DRAWS)]
    compared(inputs, lambda qkv: attention.attend(qkv, HEADS, sequences), lambda qkv: reference(qkv, sequences))


def test_backward_keeps_qkv_alone() -> None:
    qkv = torch.randn(12, 3 * WIDTH, requires_grad=True)
    saved = attention.attend(qkv, HEADS, make(((4, 3),), False, 0, False)).grad_fn.saved_tensors  # type: ignore[union-attr]
    assert len(saved) == 1 and saved[0] is qkv


def test_what_is_served() -> None:
    short, long = make(((2, 30),), True, 34, False), make(((2, 30),), True, 35, False)
    x = torch.empty(4, 3 * WIDTH)
    assert short_attention.serves(x, HEADS, WIDTH, short)
    assert not short_attention.serves(x, HEADS, WIDTH, long)
    assert not short_attention.serves(x, 8, WIDTH, short)  # a head of 8
    assert not short_attention.serves(x.double(), HEADS, WIDTH, short)
    assert not short_attention.serves(x.to("meta"), HEADS, WIDTH, short)


@pytest.mark.parametrize("name", ["prompts", "shared prefix"])
def test_dispatcher_ops_are_declared_rightly(name: str) -> None:
    sequences = CASES[name]
    rows = sequences.prefix + sequences.body
    q, k, v, dy = draw(0, rows, WIDTH), draw(1, rows, WIDTH), draw(2, rows, WIDTH), draw(3, rows, WIDTH)
    constants = short_attention._constants(HEADS, sequences, pooled=False)
    checks = ("test_schema", "test_faketensor")  # they are below autograd
    ops = torch.ops.fastlora
    torch.library.opcheck(ops.short_attention.default, (q, k, v, *constants), test_utils=checks)
    into = [torch.zeros(rows, WIDTH) for _ in range(3)]
    torch.library.opcheck(ops.short_attention_backward.default, (dy, q, k, v, *into, *constants), test_utils=checks)


def test_flops_are_those_of_whole_squares() -> None:
    sequences = make(((2, 3), (1, 5)), True, 4, False)
    pairs = 4 * 4 + 2 * 3 * 7 + 5 * 9
    qkv = torch.randn(4 + 11, 3 * WIDTH, requires_grad=True)
    assert count_flops(lambda: attention.attend(qkv, HEADS, sequences)) == 2 * 2 * pairs * WIDTH
    assert count_flops(lambda: attention.attend(qkv, HEADS, sequences).sum().backward()) == (2 + 5) * 2 * pairs * WIDTH
    q, kv = torch.randn(3, WIDTH), torch.randn(4 + 11, 2 * WIDTH)
    read = 2 * 7 + 9
    assert count_flops(lambda: attention.attend_pooled(q, kv, HEADS, sequences)) == 2 * 2 * read * WIDTH
