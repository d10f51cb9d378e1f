"""Training in 16 bits over frozen weights that are cast once: the bits of autocast, no cast in a step, the model as it was."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.encoders import frozen_in
from fastlora.fewshot import loop as loop_module
from fastlora.fewshot import mergerun, trainer
from fastlora.fewshot.errors import Interrupted
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.objective import ZeroShotTerm, frozen_twin
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.runfolder import RunFolder
from fastlora.fewshot.trainer import Job
from loops import CLASSES, loop, losses, weights
from models import tiny

QUIET = Console(quiet=True)
BF16 = torch.bfloat16
POOLER = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}
LOOPS: dict[str, dict[str, Any]] = {
    "all blocks": {},
    "image tower alone": {"lora": {"encoders": ("vision",)}},
    "QuickGELU and MLPs": {"quick_gelu": True, "lora": {"targets": ("q", "v", "fc1", "fc2")}},
    "attentional pooling": {"vision_cfg": POOLER},
    "share_prefix": {"share_prefix": True},
    "an image at a time": {"microbatch": 1},
    "zero-shot term": {"term": True},
    "zero-shot term, all trained": {"term": True, "method": "full"},
}


class Casts(TorchDispatchMode):
    """Counts casts and copies whose source is one of `tensors`, or a part of one."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.storages = {t.untyped_storage().data_ptr() for t in tensors}
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1 if func is torch.ops.aten.copy_.default else 0]
            self.seen += source.untyped_storage().data_ptr() in self.storages
        return func(*args, **(kwargs or {}))


def made(name: str) -> tuple[Loop, list[nn.Module]]:
    """One of LOOPS, in bf16, and the models in it."""
    options = {**LOOPS[name]}
    host = tiny(quick_gelu=options.pop("quick_gelu", False), vision_cfg=options.pop("vision_cfg", {}))
    if not options.pop("term", False):
        return loop(dtype=BF16, model=host, **options), [host]
    twin = frozen_twin(host, share="method" not in options)
    text = torch.nn.functional.normalize(torch.randn(CLASSES, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    return loop(dtype=BF16, model=host, term=ZeroShotTerm(twin, text, 1.0, 1.0), **options), [host, twin]


def frozen(models: list[nn.Module]) -> list[Tensor]:
    return [p for model in models for p in model.parameters() if not p.requires_grad]


@pytest.mark.parametrize("name", LOOPS)
def test_a_step_casts_no_frozen_weight(name: str) -> None:
    run, models = made(name)
    losses(run, 1)  # what lies below the adapters is computed once
    with Casts(frozen(models)) as autocast:
        losses(run, 1)
    with run._frozen_in():
        losses(run, 1)
        with Casts(frozen(models)) as once:
            losses(run, 1)
    assert once.seen == 0 and autocast.seen > 25


@pytest.mark.parametrize("name", LOOPS)
def test_bit_for_bit_autocast(name: str) -> None:
    (ours, models), (autocast, _) = made(name), made(name)
    before = [(p, p.data_ptr(), p.dtype, p.detach().clone()) for p in frozen(models)]
    with ours._frozen_in():
        found = losses(ours)
    assert torch.equal(found, losses(autocast)) and found[0, 0] != found[-1, 0]
    expected = weights(autocast)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(ours).items())
    for parameter, address, dtype, values in before:
        assert (parameter.data_ptr(), parameter.dtype) == (address, dtype) and torch.equal(parameter, values)


def test_the_hosts_own_tower_is_left_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    resnet = {"layers": (1, 1, 1, 1), "width": 8, "head_width": 16}
    run = loop(dtype=BF16, model=tiny(vision_cfg=resnet), lora={"encoders": ("text",)})
    told = "the image tower runs by the host's own method, and its frozen weights are cast anew at every step: ModifiedResNet"
    assert told in capsys.readouterr().out
    with run._frozen_in():
        assert {p.dtype for p in run.model.visual.parameters()} == {torch.float32}
        assert run.model.transformer.resblocks[0].mlp.c_fc.weight.dtype == BF16
    loop(model=tiny(vision_cfg=resnet), lora={"encoders": ("text",)})
    loop(dtype=BF16)
    assert "cast" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["bf16", "fp16"])
def test_what_is_cast(dtype: torch.dtype) -> None:
    """The host's own method sums in the dtype it had, too."""
    host = tiny(vision_cfg=POOLER)
    kept = ("token_embedding", "positional_embedding", "ln_", "logit_scale", "visual.attn_pool.query")
    host.requires_grad_(False)
    host.visual.conv1.requires_grad_(True)
    with frozen_in(dtype, host, host):
        for name, parameter in host.named_parameters():
            stays = name.startswith(kept) or ".ln_" in name or name == "visual.conv1.weight"
            assert parameter.dtype == (torch.float32 if stays else dtype), name
        assert host.transformer.get_cast_dtype() == torch.float32
    assert {p.dtype for p in host.parameters()} == {torch.float32}
    assert not any("dtype" in name for module in host.modules() for name in vars(module))
    with frozen_in(None, host):
        assert {p.dtype for p in host.parameters()} == {torch.float32}


def whole_run(model: str, data: Path, out: Path, resume: bool = False, **changes: Any) -> None:
    small = {"shots": 2, "iterations": 6, "batch_size": 4, "lr": 1e-2, "pretrained": None, "precision": "bf16"}
    trainer.run(Job(Recipe(**{"model": model, **small, **changes}), str(data), out, device="cpu", resume=resume), QUIET)


@pytest.mark.parametrize("changes", [{"kl_weight": 1.0}, {"method": "coop"}], ids=["lora", "coop"])
def test_a_whole_run_leaves_what_autocast_leaves(
    model: str, folder: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped on its way and resumed: the same history, predictions, adapter and merged model, byte for byte."""
    train_step, dtypes = Loop.train_step, set()

    def step(loop: Loop) -> None:
        train_step(loop)
        dtypes.add(loop.model.visual.conv1.weight.dtype)
        if loop.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "train_step", step)
        with pytest.raises(Interrupted):
            whole_run(model, folder, tmp_path / "ours", **changes)
    whole_run(model, folder, tmp_path / "ours", resume=True, **changes)
    assert dtypes == {BF16}
    monkeypatch.setattr(loop_module, "frozen_in", lambda *_: contextlib.nullcontext())
    whole_run(model, folder, tmp_path / "autocast", **changes)
    trained = "context.safetensors" if "method" in changes else "adapter.safetensors"
    for name in ("history.csv", "predictions.csv", trained):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "autocast" / name).read_bytes(), name
    if "method" not in changes:
        for run in ("ours", "autocast"):
            mergerun.run(RunFolder(tmp_path / run), tmp_path / f"{run}.safetensors", "fp32", QUIET)
        assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "autocast.safetensors").read_bytes()
