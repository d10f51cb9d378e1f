"""Several adapters on one model: each computes what it computes alone, and nothing else changes when they are switched."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.encoders.precision import cast
from fastlora.record import lora_layers
from models import features, inputs, randomise_adapters, tiny

BIRDS: dict[str, Any] = {"rank": 3, "targets": ("q", "o", "fc2"), "layers": (0, 1), "scaling": "alpha/r"}
TRAIN: dict[str, Any] = {"encoders": "vision", "layers": (2,)}  # "train" is a name of nn.Module's own, and a fair name


def both(model: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return features(model, *inputs(model))


def alone(seed: int, **options: Any) -> Any:
    """A model with this one adapter, B not zero."""
    model = tiny()
    torch.manual_seed(seed)
    fastlora.patch(model, **options)
    randomise_adapters(model, seed=seed)
    return model


@pytest.fixture
def model() -> Any:
    """A model with "default", "birds" (active) and "train"."""
    model = alone(1)
    for seed, name, options in ((2, "train", TRAIN), (3, "birds", BIRDS)):
        torch.manual_seed(seed)
        fastlora.add_adapter(model, name, **options)
        values = alone(seed, **options)
        with torch.no_grad():
            for ours, theirs in zip(fastlora.lora_parameters(model), fastlora.lora_parameters(values), strict=True):
                ours.copy_(theirs)
    return model


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_each_computes_what_it_computes_alone(model: Any) -> None:
    expected = {
        None: both(tiny()),
        "default": both(alone(1)),
        "train": both(alone(2, **TRAIN)),
        "birds": both(alone(3, **BIRDS)),
    }
    for name in ("birds", "default", "train", None, "birds"):
        fastlora.set_adapter(model, name)
        for got, want in zip(both(model), expected[name], strict=True):
            # a drop-in without an active adapter stands in the blocks that another one is on: its attention rounds differently
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected["birds"][0], expected["default"][0])


def test_the_active_one_is_what_is_trained(model: Any) -> None:
    keys = set(model.state_dict())
    for name, below in (("default", ""), ("birds", "named.birds."), (None, None)):
        fastlora.set_adapter(model, name)
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        ours = {f"{p}.{below}{m}" for p, layer in lora_layers(model) if layer.adapted for m in ("lora_A", "lora_B")}
        assert trainable == ours and len(fastlora.lora_parameters(model)) == len(ours)
        assert set(model.state_dict()) == keys  # a key belongs to one adapter, whichever is active
    fastlora.set_adapter(model, "birds")
    model.train()
    sum(f.sum() for f in features(model, *inputs(model))).backward()  # type: ignore[union-attr]
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if "named.birds." in n
    }


def test_disabled_is_the_plain_model_for_a_while(model: Any) -> None:
    plain, adapted = both(tiny()), both(model)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    for merged in (False, True):
        if merged:
            fastlora.merge(model)
            adapted = both(model)
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyError), fastlora.disabled(model), fastlora.disabled(model):
            for got, want in zip(both(model), plain, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            raise KeyError  # an error inside must not leave the adapters off
        assert_equal(both(model), adapted)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted


def test_delete_and_unpatch(model: Any) -> None:
    plain = tiny()
    before = both(model)
    fastlora.delete_adapter(model, "default")
    fastlora.delete_adapter(model, "train")
    assert_equal(both(model), before)
    assert {n.rpartition("resblocks.")[2][2:] for n in model.state_dict() if "lora_A" in n} == {
        f"{m}.named.birds.lora_A" for m in ("attn", "attn.out_proj", "mlp.c_proj")
    }
    fastlora.delete_adapter(model, "birds")
    assert set(model.state_dict()) == set(plain.state_dict()) and not fastlora.lora_parameters(model)
    fastlora.add_adapter(model, "birds")
    fastlora.unpatch(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert_equal(both(model), both(plain))


def test_an_attention_that_comes_after_its_out_proj(tmp_path: Path) -> None:
    """The second adapter's drop-in is put around a module that the first one is on; unpatch takes both out."""
    model, plain = tiny(), tiny()
    fastlora.patch(model, targets="fc1")
    fastlora.add_adapter(model, "o", targets=("o", "q"))
    fastlora.unpatch(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]


def test_files_by_name(model: Any, tmp_path: Path) -> None:
    for name in ("birds", "default"):
        fastlora.save(model, tmp_path / f"{name}.safetensors", adapter=name)
    fastlora.save(model, tmp_path / "default.pt", adapter="default", format="clip-lora")
    assert both(model)[0].equal(both(model)[0])
    fresh = tiny()
    fastlora.load(fresh, tmp_path / "birds.safetensors", adapter="a")
    fastlora.load(fresh, tmp_path / "default.safetensors", adapter="b")
    fastlora.load(fresh, tmp_path / "default.pt", adapter="c")
    default, birds = both(alone(1)), both(alone(3, **BIRDS))
    for name, want in (("c", default), ("b", default), ("a", birds)):
        fastlora.set_adapter(fresh, name)
        for got, expected in zip(both(fresh), want, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # a file that does not fit leaves the adapters as they are
    before, keys = both(fresh), list(fresh.state_dict())
    with pytest.raises(ValueError, match="other base weights"):
        other = tiny(seed=1)
        fastlora.patch(other)
        fastlora.save(other, tmp_path / "other.safetensors")
        fastlora.load(fresh, tmp_path / "other.safetensors", adapter="d")
    assert_equal(both(fresh), before)
    assert list(fresh.state_dict()) == keys


def test_copies_dtypes_and_checkpoints(model: Any, tmp_path: Path) -> None:
    want = both(model)
    torch.save(model, tmp_path / "whole.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert_equal(both(twin), want)
        fastlora.set_adapter(twin, "default")
        assert not torch.equal(both(twin)[0], want[0])
    model.load_state_dict(tiny().state_dict())  # strict: a plain checkpoint leaves every adapter alone
    assert_equal(both(model), want)
    cast(model, torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}  # of inactive ones too
    assert {p.dtype for p in model.double().parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fastlora.add_adapter(m, "birds"), "has an adapter called 'birds'"),
        (lambda m: fastlora.add_adapter(m, "a.b"), "letters, digits"),
        (lambda m: fastlora.add_adapter(m, "new", rank=49), "rank 49 is above the width"),
        (lambda m: fastlora.set_adapter(m, "dogs"), "no adapter is called 'dogs': there are default, train, birds"),
        (lambda m: fastlora.delete_adapter(m, "dogs"), "no adapter is called 'dogs'"),
        (lambda m: fastlora.save(m, "x", adapter="dogs"), "no adapter is called 'dogs'"),
        (lambda m: fastlora.patch(m), "unpatch"),
        (lambda m: (fastlora.merge(m), fastlora.set_adapter(m, "default")), "is merged into the weights"),
        (lambda m: (fastlora.merge(m), fastlora.delete_adapter(m, "birds")), "is merged into the weights"),
        (lambda m: (fastlora.merge(m), fastlora.add_adapter(m, "new")), "is merged into the weights"),
    ],
    ids=["twice", "name", "rank", "set", "delete", "save", "patch", "set-merged", "delete-merged", "add-merged"],
)
def test_mistakes_are_told_and_change_nothing(model: Any, call: Any, message: str) -> None:
    state, modules = list(model.state_dict()), dict(model.named_modules())
    before = both(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    fastlora.unmerge(model)
    assert list(model.state_dict()) == state and dict(model.named_modules()) == modules
    assert_equal(both(model), before)


@pytest.mark.parametrize("verb", [fastlora.set_adapter, fastlora.delete_adapter], ids=["set", "delete"])
def test_a_plain_model_has_none(verb: Any) -> None:
    with pytest.raises(ValueError, match="not patched"):
        verb(tiny(), "default")
    with pytest.raises(ValueError, match="not patched"), fastlora.disabled(tiny()):
        pass
