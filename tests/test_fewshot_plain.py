"""The training loop beside a plain one, written here from the recipe: the host's own encoders, AdamW, no engine."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import fastlora
from fastlora.fewshot.crops import crop_on_cpu
from loops import CLASSES, IMAGES, STEPS, loop, losses, pictures, tokens, weights
from models import tiny

LR, LR_MIN, DECAY = 1e-2, 1e-6, 1e-2


def plain(dropout: float) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of the recipe on the pictures of loops.py, and the adapters after it; the draws alone are the loop's."""
    model, images = tiny(), pictures()
    torch.manual_seed(5)
    fastlora.patch(model, rank=4, dropout=dropout, backend="reference")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.999), weight_decay=DECAY, foreach=False)
    draws, prompts = loop().draws, tokens()
    labels = torch.arange(IMAGES) % CLASSES
    found = []
    for step in range(STEPS):
        draw = draws(step)
        crops = crop_on_cpu([images[i] for i in draw.index], draw.boxes, 32)
        batch = tv.normalize(crops.float() / 255, [0.5] * 3, [0.25] * 3)
        image, text = F.normalize(model.encode_image(batch), dim=-1), F.normalize(model.encode_text(prompts), dim=-1)
        loss = F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels[draw.index])
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LR_MIN + (LR - LR_MIN) * (1 + math.cos(math.pi * step / STEPS)) / 2
        optimizer.step()
        found.append(loss.item())
    return found, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("fill", [False, True], ids=["short", "filled"])
def test_without_dropout_the_losses_agree_step_by_step(fill: bool) -> None:
    expected, theirs = plain(0.0)
    made = loop(on_device=False, fill=fill, dropout=0.0)
    assert losses(made)[:, 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert max(expected) > 1.2 * min(expected)  # something moves
    for name, tensor in weights(made).items():
        # AdamW divides by the gradient's size: rounding shows where gradients are near zero
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
