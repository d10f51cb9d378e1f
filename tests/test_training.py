"""Training with the patch beside the reference and beside a LoRA written as textbooks do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.record import lora_layers
from models import features, inputs, tiny

STEPS = 30


class TextbookLoRA(nn.Module):
    """Weight + scale · B A of every group, as a parametrization: autograd goes through the dense product."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone()), scale

    def forward(self, weight: Tensor) -> Tensor:
        parts = [b @ a for a, b in zip(self.a, self.b.chunk(len(self.a)), strict=True)]
        return weight + self.scale * torch.cat(parts)


def train(model: nn.Module, parameters: list[nn.Parameter]) -> list[float]:
    """Losses of STEPS steps of AdamW on a fixed classification of images among prompts."""
    images, tokens = inputs(model, batch=6)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    torch.manual_seed(11)
    losses = []
    for _ in range(STEPS):
        image, text = (F.normalize(f, dim=-1) for f in features(model, images.to(dtype), tokens))
        loss = F.cross_entropy(20 * image @ text.T, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def patched(dtype: torch.dtype, backend: str, dropout: float = 0.0) -> nn.Module:
    model = tiny().train()
    torch.manual_seed(2)
    fastlora.patch(model, rank=4, dropout=dropout, backend=backend)
    return model.to(dtype)


def textbook_losses() -> list[float]:
    ours = patched(torch.float64, "reference")
    model = copy.deepcopy(tiny().train().double()).requires_grad_(False)
    for path, layer in lora_layers(ours):
        attention = model.get_submodule(path)
        lora = TextbookLoRA(attention.in_proj_weight, *layer.adapters(), layer.spec.scale)
        nn.utils.parametrize.register_parametrization(attention, "in_proj_weight", lora)
    return train(model, [p for p in model.parameters() if p.requires_grad])


def test_reference_and_eager_follow_the_textbook_in_fp64() -> None:
    expected = textbook_losses()
    assert expected[-1] < 0.6 * expected[0]  # something is learnt, so that following means something
    for backend in ("reference", "eager"):
        model = patched(torch.float64, backend)
        assert train(model, fastlora.lora_parameters(model)) == pytest.approx(expected, rel=1e-9)


def test_eager_follows_the_reference_with_dropout() -> None:
    losses = []
    for backend in ("reference", "eager"):
        model = patched(torch.float64, backend, dropout=0.25)
        losses.append(train(model, fastlora.lora_parameters(model)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


def test_fp32_follows_fp64() -> None:
    """Rounding of 30 steps: AdamW divides by gradients near zero, so curves part slowly; a wrong gradient parts at once."""
    model = patched(torch.float32, "eager")
    assert train(model, fastlora.lora_parameters(model)) == pytest.approx(textbook_losses(), rel=1e-3)
