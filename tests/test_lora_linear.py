"""lora_linear: backends against the fp64 truth and each other, gradients, dtypes, strides, bad input."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastlora
from fastlora import lora_linear, reference, rng
from fastlora.config import OpSpec
from fastlora.testing import assert_within_budget


@dataclasses.dataclass
class Case:
    """Inputs of one call."""

    m: int = 11
    n: int = 24
    k: int = 20
    rank: int = 3
    active: tuple[bool, ...] = (True, True, True)
    bias: bool = True
    dropout: float = 0.25
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(self.dtype)

        active = sum(self.active)
        x, weight = draw(self.m, self.k), draw(self.n, self.k) / self.k**0.5
        bias = draw(self.n) if self.bias else None
        a = draw(active, self.rank, self.k) / self.k**0.5
        b = draw(active * self.n // len(self.active), self.rank)
        return x.requires_grad_(), weight, bias, a.requires_grad_(), b.requires_grad_()

    def call(self, tensors: Any, backend: str | None = "eager", **changes: Any) -> Tensor:
        options: dict[str, Any] = {"scale": 0.7, "dropout": self.dropout, "seed": 5, "active": self.active}
        return lora_linear(*tensors, backend=backend, **{**options, **changes})


CASES = {
    "single": Case(active=(True,)),
    "single-p0": Case(active=(True,), dropout=0.0),
    "packed": Case(),
    "packed-p0": Case(dropout=0.0),
    "packed-q-v": Case(active=(True, False, True)),
    "packed-k-nobias": Case(active=(False, True, False), bias=False),
    "one-row": Case(m=1),
    "rank-1-p0.1": Case(rank=1, dropout=0.1),
    "many-rows": Case(m=1100, rank=2),  # more than a CPU's thin products take at a time
    "whole-vectors": Case(m=37, n=96, k=144, rank=2, active=(True, False, True)),  # what fastlora.thin takes in float32
    "two-groups-wide": Case(n=260, k=300, rank=5, active=(True, True), dropout=0.5),
}
# Triton without a GPU means its interpreter: a second a call, so it runs what the others run at a few small shapes
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="Triton is for Linux only"))
BACKENDS = ["eager", "reference", TRITON]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def results(case: Case, backend: str, dy: Tensor, **changes: Any) -> dict[str, Tensor]:
    """Output and gradients, per group."""
    tensors = case.tensors()
    y = case.call(tensors, backend, **changes)
    x, _, _, a, b = tensors
    dx, da, db = torch.autograd.grad(y, (x, a, b), dy.to(y.dtype))
    named = {"y": y.detach(), "dx": dx}
    named |= {f"da[{i}]": g for i, g in enumerate(da)} | {f"db[{i}]": g for i, g in enumerate(db.chunk(len(a)))}
    return named


def upstream(case: Case) -> Tensor:
    return torch.randn(case.m, case.n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@each_case
def test_eager_follows_the_reference_in_fp64(case: Case) -> None:
    dy = upstream(case)
    truth = results(case, "reference", dy)
    for name, value in results(case, "eager", dy).items():
        torch.testing.assert_close(value, truth[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_case
def test_eager_is_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    """Against the plain form in the same dtype; the truth takes the same rounded inputs."""
    low = dataclasses.replace(case, dtype=dtype)
    x, weight, bias, a, b = low.tensors()
    exact = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, bias, a, b)]
    dy = upstream(case).to(dtype)
    y = case.call(exact, "reference")
    dx, da, db = torch.autograd.grad(y, (exact[0], exact[3], exact[4]), dy.double())
    truth = {"y": y.detach(), "dx": dx} | {f"da[{i}]": g for i, g in enumerate(da)}
    truth |= {f"db[{i}]": g for i, g in enumerate(db.chunk(len(a)))}
    assert_within_budget(results(low, "eager", dy), results(low, "reference", dy), truth, dtype)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@each_case
def test_gradcheck(case: Case, backend: str) -> None:
    x, weight, bias, a, b = dataclasses.replace(case, m=min(case.m, 4), n=12 if len(case.active) == 3 else 8, k=6).tensors()

    def op(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return case.call((x, weight, bias, a, b), backend)

    assert torch.autograd.gradcheck(op, (x, a, b))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40), width=st.integers(1, 40), k=st.integers(1, 300), rank=st.integers(1, 9),
    active=st.lists(st.booleans(), min_size=1, max_size=4).filter(any), bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)  # fmt: skip
def test_eager_follows_the_reference_on_any_shape(
    m: int, width: int, k: int, rank: int, active: list[bool], bias: bool, dropout: float
) -> None:
    case = Case(m, width * len(active), k, rank, tuple(active), bias, dropout)
    dy = upstream(case)
    truth = results(case, "reference", dy)
    for name, value in results(case, "eager", dy).items():
        torch.testing.assert_close(value, truth[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def placed(case: Case) -> list[Any]:
    """The tensors of a case where every backend runs."""
    return [t if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in case.tensors()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_strides(backend: str) -> None:
    case = Case(m=24, dtype=torch.float32)
    x, *rest = placed(case)
    flat = case.call((x, *rest), backend)
    same = functools.partial(torch.testing.assert_close, expected=flat, rtol=1e-5, atol=1e-5)
    same(case.call((x.view(2, 3, 4, -1), *rest), backend).view(24, -1))
    wide = torch.zeros(24, 40, device=DEVICE)
    wide[:, ::2] = x.detach()
    same(case.call((wide[:, ::2], *rest), backend))
    same(case.call((x.detach().T.contiguous().T, *rest), backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 5)], ids=str)
def test_empty_input_has_empty_output_and_zero_gradients(backend: str, leading: tuple[int, ...]) -> None:
    case = Case(m=0, dtype=torch.float32)
    x, weight, bias, a, b = placed(case)
    y = case.call((x.view(*leading, case.k), weight, bias, a, b), backend)
    assert y.shape == (*leading, case.n)
    dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
    assert dx.shape == x.shape and not da.any() and not db.any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from NumPy, the interpreter's arithmetic
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(backend: str, dropout: float, value: float) -> None:
    """As in torch: a row of x spoils its row of y and no other; a NaN that dropout drops still meets the base weight."""
    case = Case(dropout=dropout, dtype=torch.float32)
    x, *rest = placed(case)
    x = x.detach().clone()
    x[3, 5] = value
    y = case.call((x, *rest), backend)
    others = torch.arange(case.m, device=DEVICE) != 3
    assert not y[3].isfinite().any()
    assert y[others].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from NumPy, the interpreter's arithmetic
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_dy_spoils_its_row_of_dx_and_what_sums_over_rows(backend: str) -> None:
    case = Case(dropout=0.25, dtype=torch.float32)
    x, weight, bias, a, b = placed(case)
    dy = torch.ones(case.m, case.n, device=DEVICE)
    dy[2, 1] = float("nan")
    dx, da, db = torch.autograd.grad(case.call((x, weight, bias, a, b), backend), (x, a, b), dy)
    assert not dx[2].isfinite().any() and dx[torch.arange(case.m, device=DEVICE) != 2].isfinite().all()
    assert db[1].isnan().all() and db[torch.arange(case.n, device=DEVICE) != 1].isfinite().all()
    assert da[0].isnan().any() and da[1:].isfinite().all()


def test_only_wanted_gradients_exist() -> None:
    case = Case()
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        x, weight, bias, a, b = case.tensors()
        for tensor, want in zip((x, a, b), wanted, strict=True):
            tensor.requires_grad_(want)
        case.call((x, weight, bias, a, b)).sum().backward()
        assert tuple(t.grad is not None for t in (x, a, b)) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_repeats_the_first(backend: str) -> None:
    case = Case(dtype=torch.float32)
    tensors = placed(case)
    y = case.call(tensors, backend, seed=None)  # drawn: backward must not draw again
    first = torch.autograd.grad(y.sum(), tensors[3], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), tensors[3])[0])


def test_a_seed_advanced_in_place_after_forward_changes_nothing() -> None:
    case = Case()
    tensors = case.tensors()
    seed = torch.tensor(5)
    y = case.call(tensors, seed=seed)
    expected = torch.autograd.grad(case.call(tensors).sum(), tensors[3])[0]
    seed += 1
    torch.testing.assert_close(torch.autograd.grad(y.sum(), tensors[3])[0], expected, rtol=0, atol=0)


def test_torch_manual_seed_governs_the_mask() -> None:
    case = Case()
    tensors = case.tensors()
    ys = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys.append(case.call(tensors, seed=None))
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])


def test_rows_carry_their_mask_wherever_they_stand() -> None:
    """A shuffled, cut batch gives each row the mask it has in the whole one: outputs and gradients."""
    case = Case(m=40)
    x, *rest = case.tensors()
    whole = case.call((x, *rest))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for part in order.split(16):
        torch.testing.assert_close(case.call((x[part], *rest), rows=part), whole[part], rtol=1e-12, atol=1e-12)


def test_one_group_of_a_packed_projection_draws_the_mask_it_has_there() -> None:
    case = Case()
    x, weight, bias, a, b = case.tensors()
    assert bias is not None
    packed = case.call((x, weight, bias, a, b))
    width = case.n // 3
    for i in range(3):
        span = slice(i * width, (i + 1) * width)
        alone = case.call((x, weight[span], bias[span], a[i], b[span]), groups=(i,), active=None)
        torch.testing.assert_close(alone, packed[:, span], rtol=1e-12, atol=1e-12)


def test_low_precision_base_with_fp32_masters() -> None:
    case = Case(dtype=torch.bfloat16)
    x, weight, bias, a, b = case.tensors()
    a, b = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    y = case.call((x, weight, bias, a, b))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad is not None and x.grad.dtype == torch.bfloat16
    assert a.grad is not None and a.grad.dtype == torch.float32 and b.grad is not None and b.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype(backend: str) -> None:
    # the interpreter multiplies bfloat16 wrongly
    half = torch.float16 if backend == "triton" and DEVICE == "cpu" else torch.bfloat16
    case = Case(dtype=torch.float32)
    tensors = placed(case)
    with torch.autocast(DEVICE, half):
        y = case.call(tensors, backend)
    assert y.dtype == half
    low = [None if t is None else t.detach().to(half) for t in tensors]
    torch.testing.assert_close(y, case.call(low, backend), rtol=0, atol=0)
    y.float().sum().backward()
    assert tensors[0].grad is not None and tensors[0].grad.dtype == torch.float32


def test_dropout_keeps_the_expectation() -> None:
    """The mean over many masks is the product without dropout."""
    spec = OpSpec(1.0, 0.25)
    x, weight = torch.ones(20000, 8), torch.zeros(1, 8)
    a, b = torch.ones(1, 1, 8), torch.ones(1, 1)
    y = reference.lora_linear(x, weight, None, a, b, spec, torch.tensor(3))
    # 8 kept-or-dropped values of 0 or 4/3 a row: mean 8, standard error sqrt(8/3)/sqrt(20000) = 0.0115; 5 of them
    assert abs(float(y.mean()) - 8.0) < 0.058


def test_rounded_probability() -> None:
    assert [rng.bit_planes(p) for p in (0.0, 0.25, 0.5, 0.1, 0.001, 0.999)] == [
        (0, 0), (1, 2), (1, 1), (13, 7), (0, 0), (255, 8),
    ]  # fmt: skip


def _bad(change: str) -> tuple[list[Any], dict[str, Any]]:
    x, w, bias, a, b = (t.detach() if t is not None else t for t in Case(dtype=torch.float32).tensors())
    args: dict[str, Any] = {"x": x, "weight": w, "bias": bias, "a": a, "b": b}
    options: dict[str, Any] = {"scale": 1.0, "dropout": 0.25}
    changes: dict[str, Any] = {
        "x-width": {"x": x[:, :-1]},
        "x-integer": {"x": torch.ones(3, 20, dtype=torch.int64)},
        "x-complex": {"x": torch.ones(3, 20, dtype=torch.complex64)},
        "x-scalar": {"x": torch.tensor(1.0)},
        "x-dtype": {"x": x.bfloat16()},
        "x-device": {"x": torch.empty(3, 20, device="meta")},
        "weight-3d": {"weight": w[None]},
        "weight-grad": {"weight": w.clone().requires_grad_()},
        "weight-groups": {"weight": w[:-1]},
        "bias-length": {"bias": bias[:-1] if bias is not None else None},
        "a-width": {"a": a[..., :-1]},
        "a-4d": {"a": a[None]},
        "b-rows": {"b": b[:-1]},
        "rank-0": {"a": a[:, :0], "b": b[:, :0]},
        "rank-129": {"a": torch.ones(3, 129, 20), "b": torch.ones(24, 129)},
        "dropout-1": {"dropout": 1.0},
        "dropout-negative": {"dropout": -0.5},
        "dropout-nan": {"dropout": float("nan")},
        "seed-float": {"seed": 1.5},
        "seed-negative": {"seed": -1},
        "seed-int32": {"seed": torch.tensor(1, dtype=torch.int32)},
        "seed-two": {"seed": torch.tensor([1, 2])},
        "rows-length": {"rows": torch.arange(3)},
        "rows-float": {"rows": torch.rand(11)},
        "groups-count": {"groups": (0, 1)},
        "active-count": {"active": (True, False, True)},
        "active-none": {"active": (False, False, False)},
        "backend": {"backend": "cuda"},
    }
    for key, value in changes[change].items():
        (args if key in args else options)[key] = value
    return list(args.values()), options


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("x-width", r"x must be \(\.\.\., 20\) for a weight of \(24, 20\), got \(11, 19\)"),
        ("x-integer", "x must be float32, float16, bfloat16 or float64, got torch.int64"),
        ("x-complex", "x must be float32, float16, bfloat16 or float64, got torch.complex64"),
        ("x-scalar", r"x must be \(\.\.\., 20\)"),
        ("x-dtype", "x, weight and bias must have one dtype: x is torch.bfloat16, weight torch.float32"),
        ("x-device", "weight is on cpu, x on meta"),
        ("weight-3d", r"weight must be \(N, K\)"),
        ("weight-grad", "weight and bias are frozen"),
        ("weight-groups", "N a multiple of 3 groups"),
        ("bias-length", r"bias must be \(24,\)"),
        ("a-width", r"lora_a must be \(3, 3, 20\)"),
        ("a-4d", r"lora_a must be \(R, K\) or \(g, R, K\)"),
        ("b-rows", r"lora_b must be \(24, 3\)"),
        ("rank-0", "rank must be from 1 to 128, got 0"),
        ("rank-129", "rank must be from 1 to 128, got 129"),
        ("dropout-1", r"dropout must be in \[0, 1\), got 1.0"),
        ("dropout-negative", "dropout must be in"),
        ("dropout-nan", "dropout must be in"),
        ("seed-float", "seed must be an int, an int64 tensor of one element or None, got float"),
        ("seed-negative", r"seed must be from 0 to 2\*\*63 - 1"),
        ("seed-int32", "seed must be an int64 tensor of one element"),
        ("seed-two", "seed must be an int64 tensor of one element"),
        ("rows-length", r"rows must be \(11,\) on cpu, got \(3,\)"),
        ("rows-float", "rows must be integers"),
        ("groups-count", "groups names 2 groups"),
        ("active-count", "lora_a holds 3 adapters, but 2 of 3 groups are active"),
        ("active-none", "lora_a holds 3 adapters, but 0 of 3 groups are active"),
        ("backend", "unknown backend 'cuda'"),
    ],
)
def test_bad_input_has_one_clear_error(change: str, message: str, backend: str | None) -> None:
    args, options = _bad(change)
    options.setdefault("backend", backend)
    with pytest.raises((ValueError, TypeError), match=message):
        lora_linear(*args, **options)


def test_forced_triton_without_a_gpu_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fastlora.backend._look_for_triton.cache_clear()
    try:
        case = Case(dtype=torch.float32)
        with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: no CUDA or ROCm device"):
            case.call(case.tensors(), "triton")
    finally:
        fastlora.backend._look_for_triton.cache_clear()
