"""The frozen MLP in pieces against the host's modules: values, gradients, what is kept, when it steps aside."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora.encoders import mlp
from fastlora.fewshot.compare import kept_for_backward
from fastlora.testing import assert_within_budget

open_clip = pytest.importorskip("open_clip")

WIDTH = 24


def host(activation: nn.Module) -> Any:
    torch.manual_seed(0)
    layers = SimpleNamespace(c_fc=nn.Linear(WIDTH, 4 * WIDTH), gelu=activation, c_proj=nn.Linear(4 * WIDTH, WIDTH))
    for layer in (layers.c_fc, layers.c_proj):
        layer.requires_grad_(False)
    return layers


def plainly(layers: Any, x: Tensor, normed: Tensor) -> Tensor:
    return x + layers.c_proj(layers.gelu(layers.c_fc(normed)))


def results(run: Any, layers: Any, x: Tensor, normed: Tensor) -> dict[str, Tensor]:
    x, normed = (t.detach().requires_grad_() for t in (x, normed))
    y = run(layers, x, normed)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None and normed.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dnormed": normed.grad}


@pytest.mark.parametrize("activation", [nn.GELU(), open_clip.transformer.QuickGELU()], ids=["gelu", "quickgelu"])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_equals_the_modules(activation: nn.Module, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_CHUNK", 10 * 4 * WIDTH * 4)  # ten rows at a time: 64 in pieces of 10 and one of 4
    layers, (x, normed) = host(activation), torch.randn(2, rows, WIDTH)
    assert mlp.serves(layers, x)
    exact = SimpleNamespace(**{name: copy.deepcopy(part).double() for name, part in vars(layers).items()})
    truth = results(plainly, exact, x.double(), normed.double())
    mine = results(mlp.frozen_mlp, layers, x, normed)
    assert_within_budget(mine, results(plainly, layers, x, normed), truth, torch.float32)


def test_rows_are_cut_into_equal_pieces_that_cover_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "_CHUNK", 1000 * 4 * 8)
    pieces = mlp._rows(1600, 8)
    assert pieces == [slice(0, 800), slice(800, 1600)]
    assert mlp._rows(0, 8) == [] and mlp._rows(3, 10**6) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_only_the_hidden_layer_is_kept() -> None:
    layers = host(open_clip.transformer.QuickGELU())
    x, normed = torch.randn(2, 64, WIDTH)
    x.requires_grad_()
    normed.requires_grad_()
    weights = [*layers.c_fc.parameters(), *layers.c_proj.parameters()]
    kept = kept_for_backward(lambda: mlp.frozen_mlp(layers, x, normed), weights)
    assert sum(kept.values()) == 64 * 4 * WIDTH * 4


def test_a_gradient_that_nobody_wants_is_not_computed() -> None:
    layers = host(nn.GELU())
    x, normed = torch.randn(2, 5, WIDTH)
    x.requires_grad_()
    mlp.frozen_mlp(layers, x, normed).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))


def test_steps_aside() -> None:
    layers, x = host(nn.GELU()), torch.randn(5, WIDTH)
    assert not mlp.serves(layers, x.bfloat16())
    assert not mlp.serves(host(nn.GELU("tanh")), x) and not mlp.serves(host(nn.ReLU()), x)
    layers.c_fc.requires_grad_(True)
    assert not mlp.serves(layers, x)
    with torch.no_grad():  # the same bits whether or not it is trained elsewhere
        assert mlp.serves(layers, x)
