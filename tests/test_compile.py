"""torch.compile, library ops, activation checkpointing: no graph break, the right masks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import lora_linear
from models import build, features, inputs, randomise_adapters, tiny

DEVICES = [
    pytest.param("eager", "cpu", id="eager-cpu"),
    pytest.param("triton", "cuda", id="triton-cuda", marks=pytest.mark.gpu),
]
INTERPRETED = pytest.param(
    "triton", "cpu", id="triton-interpreted",
    marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where no GPU is"),
)  # fmt: skip


def arguments(device: str, dropout: float = 0.25, packed: bool = True) -> tuple[list[Any], list[Any]]:
    """Positional arguments of the forward op, and its constants."""
    groups = 3 if packed else 1
    active = [True, False, True] if packed else [True]
    g = sum(active)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    tensors = [draw(10, 32), draw(48, 32), draw(48), draw(g, 4, 32), draw(48 // groups * g, 4)]
    seed = torch.tensor(3, device=device) if dropout else None
    rows = torch.arange(10, device=device) if packed else None
    return [*tensors, seed, rows], [0.5, dropout, 2, list(range(groups)), active]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize(("backend", "device"), [*DEVICES, INTERPRETED])
def test_opcheck(backend: str, device: str, packed: bool, dropout: float) -> None:
    tensors, constants = arguments(device, dropout, packed)
    x, weight, _, a, b, seed, rows = tensors
    torch.library.opcheck(torch.ops.fastlora.lora_linear_forward.default, (*tensors, *constants, backend))
    y, s = torch.ops.fastlora.lora_linear_forward(*tensors, *constants, backend)
    for needs in ([True, True, True], [True, False, False], [False, True, True]):
        torch.library.opcheck(
            torch.ops.fastlora.lora_linear_backward.default,
            (torch.randn_like(y), x, s, weight, a, b, seed, rows, *constants, backend, needs),
        )


@pytest.mark.parametrize(("backend", "device"), DEVICES)
def test_a_compiled_op_gives_the_gradients_of_the_plain_one(backend: str, device: str) -> None:
    (x, weight, bias, a, b, seed, _), (scale, dropout, site, _, active) = arguments(device)
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def loss(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = lora_linear(
            x, weight, bias, a, b, scale=scale, dropout=dropout, seed=seed, site=site, active=active, backend=backend
        )
        return y.sin().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("backend", "device"), DEVICES)
def test_a_patched_clip_compiles_without_a_graph_break(backend: str, device: str, training: bool) -> None:
    model = tiny().to(device).train(training)
    fastlora.patch(model, backend=backend, targets=("q", "k", "v", "o", "fc1", "fc2"))
    randomise_adapters(model)
    images, tokens = (t.to(device) for t in inputs(model))

    def step(images: Tensor, tokens: Tensor) -> Tensor:
        image, text = features(model, images, tokens)
        return (image @ text.T).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    loss = compiled(images, tokens)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fastlora.lora_parameters(model))
    if not training:
        torch.testing.assert_close(loss, step(images, tokens))


@pytest.mark.slow
def test_a_patched_vit_b_32_compiles_without_a_graph_break() -> None:
    model = build("ViT-B-32").train()
    fastlora.patch(model)
    images, tokens = inputs(model)
    explanation = torch._dynamo.explain(functools.partial(features, model))(images, tokens)
    assert explanation.graph_break_count == 0
    torch.compile(functools.partial(features, model), fullgraph=True, backend="aot_eager")(images, tokens)


def test_checkpointed_blocks_with_two_forwards_before_one_backward() -> None:
    """Recomputed blocks must meet the masks of their own forward, not those of the one after it."""
    grads = []
    for grad_checkpointing in (False, True):
        model = tiny().train()
        fastlora.patch(model)
        randomise_adapters(model)
        model.set_grad_checkpointing(grad_checkpointing)
        images, _ = inputs(model)
        torch.manual_seed(5)
        first, second = model.encode_image(images), model.encode_image(images.flip(0))
        (first.square().sum() + second.sum()).backward()
        grads.append([p.grad for p in fastlora.lora_parameters(model) if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_op_repeats_its_mask(use_reentrant: bool) -> None:
    (x, weight, bias, a, b, _, _), (scale, dropout, *_, active) = arguments("cpu")
    x, a, b = (t.requires_grad_() for t in (x, a, b))

    def op(x: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, a, b, scale=scale, dropout=dropout, active=active)

    results = []
    for run in (op, functools.partial(checkpoint, op, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        ys = [run(x), run(2 * x)]
        results.append([*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), (x, a, b))] if not use_reentrant else ys)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_cuda_graph_replays_masks_and_draws_new_ones(backend: str) -> None:
    """A given seed in memory keys each replay; a drawn one is drawn again in each; both with the gradients of a plain call."""
    (x, weight, bias, a, b, seed, _), (scale, dropout, site, _, active) = arguments("cuda")
    leaves = [t.requires_grad_() for t in (x, a, b)]

    def step(seed: Tensor | None) -> tuple[Tensor, ...]:
        y = lora_linear(
            x, weight, bias, a, b, scale=scale, dropout=dropout, seed=seed, site=site, active=active, backend=backend
        )
        return (y, *torch.autograd.grad(y.square().sum(), leaves))

    for given in (seed, None):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(given)
        seen = []
        for number in (11, 12, 11):
            seed.fill_(number)
            graph.replay()
            seen.append([t.clone() for t in results])
            if given is not None:
                for replayed, plain in zip(seen[-1], step(given), strict=True):
                    torch.testing.assert_close(replayed, plain)
        assert not torch.equal(seen[0][0], seen[1][0])
        assert torch.equal(seen[0][0], seen[2][0]) == (given is not None)


@pytest.mark.gpu
@pytest.mark.slow
def test_inductor_compiles_a_patched_clip_with_triton() -> None:
    model = tiny().cuda().train()
    fastlora.patch(model, backend="triton")
    randomise_adapters(model)
    images, tokens = (t.cuda() for t in inputs(model))
    grads = []
    for run in (functools.partial(features, model), torch.compile(functools.partial(features, model), fullgraph=True)):
        torch.manual_seed(4)
        with torch.random.fork_rng():
            image, text = run(images, tokens)
        (image @ text.T).square().sum().backward()
        grads.append([p.grad.isfinite().all() for p in fastlora.lora_parameters(model) if p.grad is not None])
        model.zero_grad()
    assert all(map(all, grads)) and len(grads[0]) == len(grads[1]) > 0
