"""Patched models inside other people's machinery: data and sharded parallel, compiled, cast, copied, with any optimizer."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from models import features, inputs, randomise_adapters, tiny
from sharded import BATCH, Step, train
from waiting import HANG


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes that trained together left behind."""
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("sharded.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), "2", str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=HANG)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_what_one_trains(kind: str, two_processes: Path, tmp_path: Path) -> None:
    step = Step().train()
    losses = train(step)
    fastlora.save(step.clip, tmp_path / "one.safetensors")
    halves = [json.loads((two_processes / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
    assert [sum(pair) / 2 for pair in zip(*halves, strict=True)] == pytest.approx(losses, rel=1e-4)
    one = load_file(tmp_path / "one.safetensors")
    for rank in range(2):
        found = load_file(two_processes / f"{kind}-{rank}.safetensors")
        assert set(found) == set(one)
        for name, want in one.items():
            torch.testing.assert_close(found[name], want, rtol=1e-3, atol=1e-4)


def patched(**options: Any) -> Any:
    model = tiny()
    torch.manual_seed(3)
    fastlora.patch(model, **options)
    randomise_adapters(model, 0.1)
    return model


def gradients(model: nn.Module, forward: Any = features) -> list[torch.Tensor]:
    torch.manual_seed(9)
    sum(f.float().square().mean() for f in forward(model, *inputs(model))).backward()  # type: ignore[union-attr]
    return [p.grad for p in fastlora.lora_parameters(model)]  # type: ignore[misc]


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_activation_checkpointing_of_a_whole_tower(reentrant: bool) -> None:
    """torch's checkpoint runs the towers twice: the second run must draw the first one's masks."""

    def forward(model: Any, images: torch.Tensor, tokens: torch.Tensor) -> Any:
        images = images.requires_grad_()  # a reentrant checkpoint needs an input with a gradient
        image = checkpoint(model.encode_image, images, use_reentrant=reentrant)
        return image, model.encode_text(tokens)

    want, got = gradients(patched().train()), gradients(patched().train(), forward)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients() -> None:
    def forward(model: Any, *batch: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return features(model, *batch)

    exact, got = gradients(patched(dropout=0.0).train()), gradients(patched(dropout=0.0).train(), forward)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32 and 0 < (a - b).norm() < 0.1 * b.norm()


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.002),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizers(make: Any) -> None:
    model = patched(dropout=0.0).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    images, tokens = inputs(model)
    optimizer = make(fastlora.lora_parameters(model))
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        image, text = features(model, images, tokens)
        loss = (image - text.roll(1, 1)).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_parameter_groups() -> None:
    """Other rates for B and for one tower, by the names that named_parameters gives."""
    model = patched().train()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = {key: [p for n, p in named.items() if n.endswith(key)] for key in ("lora_A", "lora_B")}
    optimizer = torch.optim.AdamW([{"params": groups["lora_A"], "lr": 0.0}, {"params": groups["lora_B"], "lr": 0.1}])
    before = {n: p.detach().clone() for n, p in named.items()}
    gradients(model)
    optimizer.step()
    assert {n for n, p in named.items() if not torch.equal(p, before[n])} == {n for n in named if n.endswith("lora_B")}


def test_a_whole_model_through_torch_save() -> None:
    model, file = patched(), io.BytesIO()
    want = features(model, *inputs(model))
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)  # our own file of a moment ago
    assert torch.equal(features(twin, *inputs(model))[0], want[0])
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = tiny(seed=4)
    fastlora.patch(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(features(other, *inputs(model))[0], want[0])


@pytest.mark.parametrize(
    "move", [lambda m: m.to("meta"), lambda m: m.half(), lambda m: m.double().float()], ids=["meta", "half", "double"]
)
def test_moved_and_cast(move: Any) -> None:
    model, plain = patched(), tiny()
    keys = list(model.state_dict())
    move(model), move(plain)
    assert list(model.state_dict()) == keys
    assert len({(p.dtype, p.device) for p in model.parameters()}) == 1
    if next(model.parameters()).device.type == "cpu":
        images, tokens = inputs(model)
        found = features(model, images.to(next(model.parameters()).dtype), tokens)
        assert all(f.isfinite().all() for f in found)
    fastlora.unpatch(model)
    assert [(n, p.dtype, p.device) for n, p in model.named_parameters()] == [
        (n, p.dtype, p.device) for n, p in plain.named_parameters()
    ]


def test_an_ema_copy_follows() -> None:
    """torch's averaged model deep-copies a patched one and updates its parameters by position."""
    model = patched().train()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    before = copy.deepcopy(fastlora.lora_parameters(ema.module))
    with torch.no_grad():
        for parameter in fastlora.lora_parameters(model):
            parameter.add_(1.0)
    ema.update_parameters(model)
    for new, old in zip(fastlora.lora_parameters(ema.module), before, strict=True):
        torch.testing.assert_close(new, old + 0.5)


def test_gradient_accumulation_is_one_larger_batch() -> None:
    model = patched(dropout=0.0).train()
    images, tokens = inputs(model, BATCH)
    for part in range(2):
        half = slice(2 * part, 2 * part + 2)
        (sum(f.square().sum() for f in features(model, images[half], tokens[half])) / BATCH).backward()  # type: ignore[union-attr]
    got = [p.grad.clone() for p in fastlora.lora_parameters(model)]  # type: ignore[union-attr]
    model.zero_grad()
    (sum(f.square().sum() for f in features(model, images, tokens)) / BATCH).backward()  # type: ignore[union-attr]
    for a, b in zip(got, fastlora.lora_parameters(model), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)
