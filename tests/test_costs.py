"""What a step costs, counted: FLOPs beside a frozen model, and bytes kept for backward beside the input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastlora
from fastlora import lora_linear
from fastlora.fewshot.compare import kept_for_backward
from fastlora.testing import count_flops
from models import build, inputs


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_packed_qkv_keeps_its_input_and_little_else(dropout: float) -> None:
    """DESIGN: at most 1.1 x-sizes, x included; the mask, the dropped x and the dense update are not kept."""
    m, d, rank = 1600, 768, 16
    x = torch.randn(m, d).requires_grad_()
    weight, bias = torch.randn(3 * d, d), torch.randn(3 * d)
    a, b = torch.randn(3, rank, d).requires_grad_(), torch.randn(3 * d, rank).requires_grad_()
    known = [weight, bias, a, b]
    kept = kept_for_backward(lambda: lora_linear(x, weight, bias, a, b, scale=1.0, dropout=dropout), known)
    assert x.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) <= 1.1 * x.nbytes


def test_what_parts_of_a_pass_keep_one_after_another_counts_once() -> None:
    w, parts = torch.randn(8, requires_grad=True), (torch.randn(50, 8), torch.randn(100, 8), torch.randn(80, 8))

    def forward() -> None:
        for part in parts:
            torch.autograd.grad((part * w).sum(), w)

    assert kept_for_backward(forward, [w]) == {parts[1].untyped_storage().data_ptr(): parts[1].nbytes}


def test_a_frozen_linear_keeps_no_input() -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    x = torch.randn(8, 64).requires_grad_()
    assert not kept_for_backward(lambda: layer(x), layer.parameters())


@pytest.mark.slow
def test_flops_of_a_patched_vit_b_32_beside_the_frozen_model() -> None:
    """DESIGN: at most 1.03 at rank 16, forward and backward to the lowest block, both encoders."""
    model = build("ViT-B-32")
    images, tokens = inputs(model)

    def step() -> None:
        # gradients flow to the inputs of the lowest block in both, so that both do the same dx work
        (model.encode_image(images).sum() + model.encode_text(tokens).sum()).backward()

    fastlora.patch(model, rank=16)
    model.train()
    patched = count_flops(step)
    fastlora.unpatch(model)
    model.requires_grad_(False)
    for leaf in (model.visual.positional_embedding, model.positional_embedding):
        leaf.requires_grad_(True)
    frozen = count_flops(step)
    assert patched / frozen <= 1.03, f"{patched / frozen:.4f}"
