"""Over configurations: patch, train, save, load elsewhere, merge, unpatch; outputs and weights are what they should be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastlora
from fastlora.config import ENCODERS, LAYERS, SCALINGS, TARGETS
from models import features, inputs, tiny


def some(values: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


CONFIGS = st.fixed_dictionaries(
    {
        "targets": some(TARGETS),
        "encoders": some(ENCODERS),
        "layers": st.sampled_from([*LAYERS, (0,), (1, 2)]),
        "rank": st.integers(1, 9),
        "alpha": st.sampled_from([1.0, 4.0]),
        "dropout": st.sampled_from([0.0, 0.25]),
        "scaling": st.sampled_from(SCALINGS),
        "rank_pattern": st.sampled_from([{}, {"*": 3}]),
    }
)


def build(dtype: torch.dtype) -> Any:
    return tiny().to(dtype)


def outputs(model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, ...]:
    images, tokens = inputs(model)
    with torch.no_grad():
        return features(model.eval(), images.to(dtype), tokens)


def train(model: nn.Module, dtype: torch.dtype, steps: int = 2) -> None:
    images, tokens = inputs(model)
    optimizer = torch.optim.AdamW(fastlora.lora_parameters(model), lr=1e-2)
    for _ in range(steps):
        found = features(model.train(), images.to(dtype), tokens)
        sum(f.float().square().mean() for f in found).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()


@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=CONFIGS, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_patch_train_save_load_merge_unpatch(config: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(dtype)
    state, modules = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_modules())
    flags, plain = {n: p.requires_grad for n, p in model.named_parameters()}, outputs(model, dtype)
    torch.manual_seed(1)
    fastlora.patch(model, **config)
    train(model, dtype)
    trained = outputs(model, dtype)
    changed = {e for e, a, b in zip(ENCODERS, trained, plain, strict=True) if (a - b).norm() > 1e-3 * b.norm()}
    assert changed >= set(config["encoders"])

    fresh = build(dtype)
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save(model, Path(folder) / "adapter.safetensors")
        fastlora.load(fresh, Path(folder) / "adapter.safetensors")
    for got, want in zip(outputs(fresh, dtype), trained, strict=True):
        assert torch.equal(got, want)

    fastlora.merge(fresh)
    for got, want in zip(outputs(fresh, dtype), trained, strict=True):
        # weights are rounded once to the base's dtype (fp64 is limited by the fp32 adapters' product), which grows with depth
        assert (got - want).norm() <= 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * want.norm()
    fastlora.unmerge(fresh)
    for got, want in zip(outputs(fresh, dtype), trained, strict=True):
        assert torch.equal(got, want)

    for adapted in (fresh, model):
        fastlora.unpatch(adapted)
        assert list(adapted.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in adapted.state_dict().items())
    assert dict(model.named_modules()) == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for got, want in zip(outputs(model, dtype), plain, strict=True):
        assert torch.equal(got, want)
