"""The compiled products with R columns: the mask of fastlora.rng, values within the budget, on every instruction set here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlora
from fastlora import cpu, eager, rng, thin
from fastlora.config import OpSpec
from fastlora.testing import assert_within_expected_budget, count_flops

compiled = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
DRAWS = 6


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@compiled
@pytest.mark.parametrize("p", [0.25, 0.5, 0.1, 0.9, 1 / 256, 255 / 256])
@pytest.mark.parametrize("columns", [16, 144, 304])
def test_the_mask_is_that_of_rng_bit_for_bit(lanes: int, columns: int, p: float) -> None:
    # identities repeat, are negative and pass 2**32; site, seed and group use high bits; M is no multiple of a tile
    rows = torch.tensor([0, 1, 2, 1, 77, 2**31, 2**32 + 5, -1, 2**62 + 3, *range(1000, 1014)])
    m, site, groups = len(rows), 0xFFFF_FFF, (2, 0, 7)
    want = [rng.keep_multiplier(SEED, site, group, rows, columns, p, torch.float32) for group in groups]
    for i, one in enumerate(want):
        dx, ds, a = torch.zeros(m, columns), torch.zeros(m, 3), torch.zeros(3, 1, columns)
        ds[:, i], a[i] = 1, 1  # Dᵀ(1 · 1) of this group alone
        da = thin.shrink_backward(ds, torch.ones(m, columns), a, dx, SEED, rows, p, site, groups)
        torch.testing.assert_close(dx, one, rtol=1e-6, atol=0)
        assert torch.equal(dx != 0, one != 0)
        torch.testing.assert_close(da[i, 0], one.sum(0), rtol=1e-5, atol=0)
    s = thin.shrink(torch.eye(columns)[torch.arange(m) % columns], torch.ones(3, 1, columns), SEED, rows, p, site, groups)
    torch.testing.assert_close(s, torch.stack([one[range(m), torch.arange(m) % columns] for one in want], 1), rtol=1e-6, atol=0)


@compiled
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("m", "k", "rank", "groups"), [(5, 16, 4, 1), (37, 144, 2, 3), (300, 256, 3, 2), (515, 80, 7, 1), (64, 768, 16, 3)]
)
def test_values_are_within_the_error_budget(
    lanes: int, two_threads: None, m: int, k: int, rank: int, groups: int, p: float
) -> None:
    """Against fp64, beside torch's own products in float32; the mean over draws, as the smallest case has few values."""
    width = 48
    spec = OpSpec(1.0, p, 3, tuple(range(groups)), (True,) * groups)
    columns = [c for _, c in spec.spans(groups * width)]

    def all_of(number: int, dtype: torch.dtype) -> dict[str, Tensor]:
        shapes = (m, k), (groups, rank, k), (m, groups * rank), (m, k), (m, groups * width), (groups * width, rank)
        x, a, ds, dx, dy, b = (draw(*shape, seed=6 * number + i).to(dtype) for i, shape in enumerate(shapes))
        s = eager._shrink(x, a, spec, SEED, None)
        da = eager._shrink_backward(ds, x, a, dx, spec, SEED, None, True)
        down, db = eager._expand_backward(dy, ds, b, columns, True, True)
        assert da is not None and down is not None and db is not None
        return {"s": s, "da": da, "dx": dx, "ds": down, "db": db}

    ours, truth = ([all_of(number, dtype) for number in range(DRAWS)] for dtype in (torch.float32, torch.float64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thin, "serves", lambda *_: False)
        plain = [all_of(number, torch.float32) for number in range(DRAWS)]
    assert_within_expected_budget(ours, plain, truth, torch.float32)
    # and they did not come from the same place
    assert any(not torch.equal(value, plain[0][name]) for name, value in ours[0].items())


# Rounding a sum changes it by at most HALF of its size. Where these changes are many and independent, each is uniform: squared,
# a third of that on average. For products of mean square 1 a sum of n of them has mean square n.
HALF = 2.0**-24


def likely(squares: float) -> float:
    """Five standard deviations of what rounding makes of a sum; `squares`: of all sums on the way to it, added up."""
    return 5 * HALF * math.sqrt(squares / 3)


@compiled
def test_sums_over_many_rows_err_little(lanes: int) -> None:
    """dA: 1 + … + 16 for each sixteen rows, 16 · (1 + … + 16) for each sixteen of these, then once: 19 a row, however many."""
    m, k = 20_000, 64
    x, a, ds = draw(m, k), draw(1, 2, k), draw(m, 2, seed=2)
    truth = ds.double().T @ x.double()
    error = (thin.shrink_backward(ds, x, a, None, None, None, 0.0, 0, [0])[0] - truth).abs().max()
    assert error < likely(19 * m)
    # the second part is for a BLAS that sums in float64 and rounds once
    assert error < (ds.T @ x - truth).abs().max() + 2 * HALF * truth.abs().max()


@compiled
def test_sums_over_many_columns_err_little(lanes: int) -> None:
    """s: a lane's sums of 32, of these, and the tree over lanes, with as many levels as LANES has bits."""
    m, k = 200, 8192
    x, a = draw(m, k), draw(1, 16, k, seed=1)
    truth = x.double() @ a[0].double().T
    error = (thin.shrink(x, a, None, None, 0.0, 0, [0]) - truth).abs().max()
    assert error < likely(k * (33 / 2 + (k / (32 * lanes) + 1) / 2 + math.log2(lanes) + 1))
    if lanes == cpu._library().fastlora_lanes(16):  # type: ignore[union-attr]  # a BLAS takes the machine's widest
        assert error < (x @ a[0].T - truth).abs().max() + 2 * HALF * truth.abs().max()


@compiled
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.7])
def test_equal_terms_do_not_add_up_errors(lanes: int, value: float) -> None:
    """Roundings in one direction: float32 allows HALF for each sum that a term goes through. For dA their number is fixed."""
    m, k = 200_000, 16
    ones = torch.ones(m, 1)
    da = thin.shrink_backward(ones, torch.full((m, k), value), ones[:1, :, None].expand(1, 1, k), None, None, None, 0.0, 0, [0])
    exact = m * float(torch.tensor(value))
    assert (da.double() - exact).abs().max() <= (16 + 16 + 1) * HALF * exact
    k = 32_768
    s = thin.shrink(torch.full((3, k), value), torch.ones(1, 1, k), None, None, 0.0, 0, [0])
    exact = k * float(torch.tensor(value))
    assert (s.double() - exact).abs().max() <= (32 + k / (32 * lanes) + math.log2(lanes) + 1) * HALF * exact


@compiled
def test_an_infinite_sum_is_infinite() -> None:
    ds, x = torch.ones(600, 1), torch.ones(600, 16)
    x[3, 0], x[3, 1], x[3, 2], x[500, 2], x[:, 3] = math.inf, math.nan, math.inf, -math.inf, 3e38
    da = thin.shrink_backward(ds, x, torch.ones(1, 1, 16), None, None, None, 0.0, 0, [0])[0, 0]
    torch.testing.assert_close(da, (ds.T @ x)[0], equal_nan=True)
    assert da[0] == da[3] == math.inf and da[1:3].isnan().all()


@compiled
def test_threads_do_not_change_rows() -> None:
    """A row of s or dx is computed by one thread alone; rows that no tile boundary divides among threads are all there."""
    x, a, ds = draw(411, 64), draw(2, 2, 64), draw(411, 4)
    seen = []
    for threads in (1, 2, 3, 64):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        dx = torch.zeros_like(x)
        da = thin.shrink_backward(ds, x, a, dx, SEED, None, 0.25, 0, [0, 1])
        seen.append((thin.shrink(x, a, SEED, None, 0.25, 0, [0, 1]), dx, da))
        torch.set_num_threads(before)
    for (s, dx, da), (s2, dx2, da2) in itertools.pairwise(seen):
        assert torch.equal(s, s2) and torch.equal(dx, dx2)
        torch.testing.assert_close(da, da2)


@compiled
def test_strides_rows_of_other_kinds_and_no_rows_at_all() -> None:
    wide = draw(33, 200)
    x, a = wide[:, 8:72], draw(1, 2, 64)
    expected = thin.shrink(x.contiguous(), a, SEED, torch.arange(33), 0.25, 0, [0])
    assert torch.equal(thin.shrink(x, a, SEED, None, 0.25, 0, [0]), expected)
    assert torch.equal(thin.shrink(x, a.mT.contiguous().mT, SEED, torch.arange(33, dtype=torch.int32), 0.25, 0, [0]), expected)
    strided = torch.arange(33).repeat_interleave(2)[::2]
    assert torch.equal(thin.shrink(x, a, SEED, strided, 0.25, 0, [0]), expected)
    ds = draw(33, 4)[:, ::2]
    da = thin.shrink_backward(ds, x, a, None, SEED, None, 0.25, 0, [0])
    assert torch.equal(da, thin.shrink_backward(ds.contiguous(), x.contiguous(), a, None, SEED, None, 0.25, 0, [0]))

    empty = torch.empty(0, 64)
    assert thin.shrink(empty, a, SEED, None, 0.25, 0, [0]).shape == (0, 2)
    assert torch.equal(thin.shrink_backward(torch.empty(0, 2), empty, a, None, SEED, None, 0.25, 0, [0]), torch.zeros(1, 2, 64))


@compiled
def test_active_groups_take_their_own_columns_of_dy() -> None:
    dy, s, b = draw(20, 96), draw(20, 4, seed=1), draw(64, 2, seed=2)
    ds, db = thin.expand_backward(dy, s, b, [0, 64])
    torch.testing.assert_close(ds, torch.cat([dy[:, :32] @ b[:32], dy[:, 64:] @ b[32:]], 1))
    torch.testing.assert_close(db, torch.cat([dy[:, :32].T @ s[:, :2], dy[:, 64:].T @ s[:, 2:]]))


@compiled
def test_infinite_and_missing_values_are_seen() -> None:
    """A dropped value is chosen away, not multiplied with 0; a kept one arrives."""
    x, a = torch.ones(4, 128), torch.ones(1, 1, 128)
    keep = rng.keep_mask(SEED, 0, 0, torch.arange(4), 128, 0.5)
    x[~keep] = math.nan
    assert thin.shrink(x, a, SEED, None, 0.5, 0, [0]).isfinite().all()
    x[2] = math.inf
    assert thin.shrink(x, a, SEED, None, 0.5, 0, [0]).isinf().flatten().tolist() == [False, False, True, False]


@compiled
@pytest.mark.parametrize("seed", [None, SEED], ids=["no-dropout", "dropout"])
def test_dispatcher_ops_are_declared_rightly(seed: Tensor | None) -> None:
    x, a, ds, dx = draw(20, 64), draw(2, 2, 64), draw(20, 4), draw(20, 64)
    mask = (seed, torch.arange(20), 0.25, 1, [0, 2])
    checks = ("test_schema", "test_faketensor")  # they are below autograd, which fastlora.autograd registers
    torch.library.opcheck(torch.ops.fastlora.shrink.default, (x, a, *mask), test_utils=checks)
    torch.library.opcheck(torch.ops.fastlora.shrink_backward.default, (ds, x, a, dx, *mask), test_utils=checks)
    torch.library.opcheck(torch.ops.fastlora.shrink_backward.default, (ds, x, a, None, *mask), test_utils=checks)
    torch.library.opcheck(torch.ops.fastlora.expand_backward.default, (x, ds, draw(64, 2), [0, 32]), test_utils=checks)


def test_fake_tensors_pass_through_the_whole_op() -> None:
    with FakeTensorMode():
        x, a = torch.empty(10, 64, requires_grad=True), torch.empty(3, 2, 64, requires_grad=True)
        b = torch.empty(96, 2, requires_grad=True)
        y = fastlora.lora_linear(x, torch.empty(96, 64), None, a, b, scale=1.0, backend="eager")
        y.sum().backward()
        assert y.shape == (10, 96) and x.grad is not None and x.grad.shape == x.shape


@compiled
def test_flops_are_counted() -> None:
    x, a, ds, dx = draw(20, 64), draw(2, 3, 64), draw(20, 6), draw(20, 64)
    product = 2 * 20 * 64 * 6
    assert count_flops(lambda: thin.shrink(x, a, SEED, None, 0.25, 0, [0, 1])) == product
    assert count_flops(lambda: thin.shrink_backward(ds, x, a, dx, SEED, None, 0.25, 0, [0, 1])) == 2 * product
    assert count_flops(lambda: thin.shrink_backward(ds, x, a, None, SEED, None, 0.25, 0, [0, 1])) == product
    assert count_flops(lambda: thin.expand_backward(draw(20, 128), ds, draw(128, 3), [0, 64])) == 2 * product


def test_what_is_not_thin_or_not_of_whole_vectors_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(4, 64)
    assert thin.serves(x, 2, 64) == cpu.available()
    for other, rank, width in (
        (x.double(), 2, 64), (x.bfloat16(), 2, 64), (x, 17, 64), (x, 2, 40), (torch.empty(64, 4).T, 2, 64),
        (torch.empty(4, 64, device="meta"), 2, 64),
    ):  # fmt: skip
        assert not thin.serves(other, rank, width)
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert not thin.serves(x, 2, 64)
