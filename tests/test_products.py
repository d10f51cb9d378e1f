"""fastlora.products: the same sum by every library, its gradients, and the cases that must not reach oneDNN."""

from __future__ import annotations

import pytest
import torch

from fastlora import products
from fastlora.testing import assert_within_budget, assert_within_expected_budget, count_flops

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("with_add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(("m", "k", "n"), [(33, 20, 7), (1, 1, 1), (0, 5, 3), (640, 1024, 2), (8, 1500, 6)])
def test_value_and_gradients(m: int, k: int, n: int, transposed: bool, with_add: bool, with_bias: bool) -> None:
    weight = torch.randn(k, n).T if transposed else torch.randn(n, k)
    bias = torch.randn(n) if with_bias else None
    inputs = [torch.randn(m, k).requires_grad_(), torch.randn(m, n).requires_grad_()]
    dy = torch.randn(m, n)

    def results(dtype: torch.dtype, ours: bool) -> dict[str, torch.Tensor]:
        x, add = (t.detach().to(dtype).requires_grad_() for t in inputs)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        if ours:
            y = products.frozen_linear(x, w, b, add if with_add else None)
        else:
            y = torch.nn.functional.linear(x, w, b) + (add if with_add else 0.0)
        y.backward(dy.to(dtype))
        found = {"y": y.detach(), "dx": x.grad} | ({"dadd": add.grad} if with_add else {})
        return {name: value for name, value in found.items() if value is not None}

    got, eager, truth = results(torch.float32, True), results(torch.float32, False), results(torch.float64, False)
    assert got.keys() == truth.keys()
    assert_within_budget(got, eager, truth, torch.float32)


def test_a_trained_weight_and_bias_get_their_gradients() -> None:
    x, weight, bias = torch.randn(5, 4), torch.randn(3, 4).requires_grad_(), torch.randn(3).requires_grad_()
    products.frozen_linear(x, weight, bias, torch.randn(5, 3)).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 4))
    torch.testing.assert_close(bias.grad, torch.full((3,), 5.0))


@pytest.mark.parametrize(("n", "draws"), [(2, 8), (16, 8), (768, 2)])
@pytest.mark.parametrize("k", [128, 256, 512, 768, 1024])
def test_the_widths_of_clip_are_within_the_budget_on_this_machine(k: int, n: int, draws: int) -> None:
    """Whoever multiplies: thin and square products, of rows whose sums are long; the mean over draws, as one is luck."""
    generator = torch.Generator().manual_seed(0)
    inputs = [(torch.randn(640, k, generator=generator), torch.randn(n, k, generator=generator)) for _ in range(draws)]
    got = [{"y": products.linear(x, weight)} for x, weight in inputs]
    eager, truth = ([{"y": x.to(to) @ weight.to(to).T} for x, weight in inputs] for to in (torch.float32, torch.float64))
    assert_within_expected_budget(got, eager, truth, torch.float32)


@onednn
def test_longer_sums_are_left_to_a_blas(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 768)
    for capability, served in (("AVX512", True), ("AVX512_VNNI", True), ("AVX2", False), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        products._longest.cache_clear()
        assert products._onednn(x, torch.randn(6, 768)) == served and products._onednn(x[:, :128], torch.randn(6, 128))
    products._longest.cache_clear()


@onednn
def test_what_reaches_onednn() -> None:
    """Dense weights and not too many columns: others are slow there, or less exact."""
    x, weight = torch.randn(4, 2048), torch.randn(6, 2048)
    assert products._onednn(x[:, :64], weight[:, :64].contiguous()) and products._onednn(x[:, :64], torch.randn(64, 3).T)
    assert not products._onednn(x[:, :64], weight[:, :64])
    assert not products._onednn(x, weight)
    assert not products._onednn(x[:, :64].half(), weight[:, :64].contiguous())
    torch._C._set_mkldnn_enabled(False)  # the public context manager warns about GPUs of another maker
    try:
        assert not products._onednn(x[:, :64], weight[:, :64].contiguous())
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_flops_are_counted_whoever_multiplies() -> None:
    x, weight, add = torch.randn(5, 16).requires_grad_(), torch.randn(7, 16), torch.randn(5, 7)
    assert count_flops(lambda: products.linear(x.detach(), weight)) == 2 * 5 * 16 * 7
    assert count_flops(lambda: products.frozen_linear(x, weight, None, add).sum().backward()) == 2 * 2 * 5 * 16 * 7


def test_flops_are_counted_whatever_computes_them() -> None:
    x, w, y = torch.randn(6, 5), torch.randn(5, 7), torch.zeros(6, 7)
    for call in (lambda: x @ w, lambda: torch.mm(x, w, out=y), lambda: torch.addmm(y, x, w), lambda: y.addmm_(x, w)):
        assert count_flops(call) == 2 * 6 * 5 * 7
    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    product = 2 * 2 * 4 * 8 * 8 * 16  # two forward; backward those of q kᵀ and dy vᵀ, dq, dk, dv
    attend = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attend(q, q, q)) == 2 * product
    assert count_flops(lambda: attend(q, q, q).sum().backward()) == (2 + 5) * product
