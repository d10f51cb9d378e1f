"""A loss of images some at a time: the same loss and gradients, less kept for backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastlora
from fastlora.encoders import ImageEncoder, TextEncoder, microbatched
from fastlora.fewshot.compare import kept_for_backward
from fastlora.fewshot.errors import UserError
from loops import loop, losses, weights
from models import inputs, randomise_adapters, tiny

COUNT = 5
LABELS = torch.tensor([0, 2, 1, 1, 0])


def patched(**options: Any) -> Any:
    model = tiny()
    torch.manual_seed(3)
    fastlora.patch(model, rank=4, dropout=0.25, **options)
    randomise_adapters(model, 0.1)
    return model.double().train()


def step(model: Any, size: int | None) -> Tensor:
    """The loss of one batch, `size` images at a time or, for None, as it is written everywhere."""
    images, tokens = inputs(model, COUNT)
    images, encoder = images.double(), ImageEncoder(model)
    text = TextEncoder(model, tokens[:3])(7, normalize=True)
    ids = torch.arange(10, 10 + COUNT)

    def loss(text: Tensor, rows: slice) -> Tensor:
        image = encoder(images[rows], 7, normalize=True, ids=ids[rows])
        return F.cross_entropy(100 * image @ text.T, LABELS[rows], reduction="sum") / COUNT

    return loss(text, slice(0, COUNT)) if size is None else microbatched(loss, COUNT, size, text, model.parameters())


def gradients(model: Any, size: int | None, scale: float = 1.0) -> dict[str, Tensor]:
    loss = step(model, size)
    (scale * loss).backward()
    return {"loss": scale * loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 2, 5, 99])
@pytest.mark.parametrize("options", [{}, {"encoders": ("vision",)}, {"encoders": ("text",)}], ids=["both", "vision", "text"])
def test_is_the_whole_loss(options: dict[str, Any], size: int) -> None:
    whole, parts = gradients(patched(**options), None, 3.0), gradients(patched(**options), size, 3.0)
    assert set(whole) == set(parts) and len(whole) > 1
    for name, want in whole.items():
        torch.testing.assert_close(parts[name], want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert any(want.abs().max() > 1e-6 for name, want in whole.items() if name != "loss")


def test_all_weights_trained() -> None:
    def full(size: int | None) -> dict[str, Tensor]:
        return gradients(tiny().double().requires_grad_(True), size)

    whole, parts = full(None), full(2)
    assert set(whole) == set(parts)
    for name, want in whole.items():
        torch.testing.assert_close(parts[name], want, rtol=1e-8, atol=1e-11)


def test_keeps_a_part_of_what_the_whole_keeps() -> None:
    model = patched(encoders=("vision",))
    kept = {size: sum(kept_for_backward(lambda s=size: step(model, s), model.parameters()).values()) for size in (None, 1)}
    assert kept[1] < 0.5 * kept[None]


def test_without_gradients_it_is_a_sum() -> None:
    model = patched()
    with torch.no_grad():
        whole, parts = step(model, None), step(model, 2)
    torch.testing.assert_close(parts, whole)
    assert not parts.requires_grad


def test_gradients_are_handed_on_once() -> None:
    total = step(patched(), 2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed on already"):
        total.backward()


@pytest.mark.parametrize("count, size", [(0, 1), (3, 0)])
def test_nothing_at_a_time_is_told(count: int, size: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        microbatched(lambda text, _: text.sum(), count, size, torch.ones(1), [])


def test_how_many_at_a_time() -> None:
    encoder = ImageEncoder(tiny())
    x = encoder.model.visual.positional_embedding.numel()
    enough, cpu = 800 * 768 // x, torch.device("cpu")  # images whose tokens are as many numbers as 800 of a ViT-B
    assert encoder.microbatch(enough, cpu) == enough
    assert encoder.microbatch(2 * enough, cpu) == enough
    assert encoder.microbatch(11 * enough // 4, cpu) == -(-(11 * enough // 4) // 3)  # three equal parts, not two and a rest
    assert encoder.microbatch(0, cpu) == 0
    assert encoder.microbatch(5 * enough, torch.device("cuda")) == 5 * enough


class TestInTheTrainer:
    def test_the_same_training(self) -> None:
        whole, parts = (loop(microbatch=size) for size in (0, 2))
        assert (whole.microbatch, parts.microbatch) == (3, 2)
        torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-4, atol=1e-5)
        for name, want in weights(whole).items():
            # AdamW divides by the gradient's size: rounding shows where gradients are near zero
            torch.testing.assert_close(weights(parts)[name], want, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("how", [{"engine": "compile"}, {"dtype": torch.float16}], ids=["compile", "fp16"])
    def test_what_it_does_not_go_with(self, how: dict[str, Any]) -> None:
        with pytest.raises(UserError, match="--microbatch 2 does not go with"):
            loop(microbatch=2, **how)
        assert loop(**how).microbatch == 3
