"""patch, unpatch, merge, unmerge on open_clip models: nothing changes that should not, everything can be undone."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from torch import Tensor, nn

import fastlora
from fastlora import LoRAConfig
from fastlora.layers import LoRALayer, LoRAMultiheadAttention, adopt
from fastlora.record import lora_layers
from models import build, features, inputs, randomise_adapters, tiny
from twins import open_clip_twin, transformers_twin

FULL = ["ViT-B-32", "ViT-B-16", "ViT-L-14", "coca_ViT-B-32"]
EVERY_VIT = [
    name
    for name in open_clip.list_models()
    if (config := get_model_config(name)) is not None
    and isinstance(config["vision_cfg"].get("layers"), int)
    and "hf_model_name" not in config["text_cfg"]  # those fetch a config from a hub
    and name not in FULL
]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def check_whole_life(model: nn.Module, dtype: torch.dtype) -> None:
    """Patch at B = 0, train B, merge, unmerge, unpatch: each step as promised."""
    model.to(dtype)
    images, tokens = inputs(model)
    images = images.to(dtype)
    state, modules = snapshot(model), dict(model.named_modules())
    with torch.no_grad():
        before = features(model, images, tokens)
        report = fastlora.patch(model)
        assert not report.skipped
        for now, then in zip(features(model, images, tokens), before, strict=True):
            # a fused attention sums in another order: a few units of the last place of the largest value
            assert (now - then).abs().max() <= 16 * torch.finfo(dtype).eps * then.abs().max()
        assert {k for k in model.state_dict() if not k.rpartition(".")[2].startswith("lora_")} == set(state)
        randomise_adapters(model, 0.02)
        adapted = features(model, images, tokens)
        assert any(not torch.equal(now, then) for now, then in zip(adapted, before, strict=True))
        fastlora.merge(model)
        for now, then in zip(features(model, images, tokens), adapted, strict=True):
            # merged weights are rounded once to the base's dtype; what that costs grows with depth
            assert (now - then).norm() <= 64 * torch.finfo(dtype).eps * then.norm()
        fastlora.unmerge(model)
        fastlora.unpatch(model)
    assert_same_state(model, state)
    assert dict(model.named_modules()) == modules


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_models(name: str) -> None:
    check_whole_life(build(name), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32"])
def test_full_models_bf16(name: str) -> None:
    check_whole_life(build(name), torch.bfloat16)


@pytest.mark.parametrize("name", EVERY_VIT)
def test_every_vit_of_open_clip_at_depth_one(name: str) -> None:
    check_whole_life(build(name, layers=1), torch.float32)


def test_defaults_are_the_papers() -> None:
    config = LoRAConfig()
    assert (config.rank, config.alpha, config.dropout, config.targets) == (2, 1.0, 0.25, ("q", "k", "v"))
    # 184,320 on B/16 and B/32 (arXiv 2405.18541): 12 blocks x 3 matrices x 2·rank·width, widths 768 and 512
    assert sum(12 * 3 * 2 * 2 * width for width in (768, 512)) == 184_320


@pytest.mark.slow
def test_trainable_parameters_of_vit_b_32() -> None:
    report = fastlora.patch(build("ViT-B-32"))
    assert report.trainable == 184_320


def test_patch_twice_is_patch_once() -> None:
    model = tiny()
    first = fastlora.patch(model)
    parameters = fastlora.lora_parameters(model)
    assert fastlora.patch(model) == first
    assert all(a is b for a, b in zip(parameters, fastlora.lora_parameters(model), strict=True))
    with pytest.raises(ValueError, match="unpatch"):
        fastlora.patch(model, rank=4)


def test_only_adapters_are_trainable_and_flags_come_back() -> None:
    model = tiny()
    model.visual.conv1.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    report = fastlora.patch(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in ("lora_A", "lora_B")}
    assert report.trainable == sum(p.numel() for p in fastlora.lora_parameters(model))
    fastlora.unpatch(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("targets", [("q",), ("q", "v"), ("o",), ("fc1", "fc2"), ("q", "k", "v", "o", "fc1", "fc2")], ids=str)
@pytest.mark.parametrize("encoders", [("vision",), ("text",), ("vision", "text")], ids=str)
def test_targets_and_encoders(targets: tuple[str, ...], encoders: tuple[str, ...]) -> None:
    model = tiny()
    images, tokens = inputs(model)
    before = features(model, images, tokens)
    state = snapshot(model)
    report = fastlora.patch(model, targets=targets, encoders=encoders, layers=(0, 2))
    randomise_adapters(model)
    now = features(model, images, tokens)
    # eval without gradients takes torch's fused attention, which rounds differently
    changed = tuple(not torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(now, before, strict=True))
    assert changed == ("vision" in encoders, "text" in encoders)
    assert all(".0." in path or ".2." in path for path in report.patched)
    per_block = any(t in targets for t in ("q", "k", "v")) + len(set(targets) - {"q", "k", "v"})
    assert len(report.patched) == per_block * 2 * len(encoders)
    sum(f.sum() for f in now).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in fastlora.lora_parameters(model))
    fastlora.unpatch(model)
    assert_same_state(model, state)


def test_gradients_are_those_of_a_textbook_lora() -> None:
    """The patched model against ΔW added to plain weights with autograd through it, in fp64."""
    model = tiny().double()
    images, tokens = inputs(model)
    plain = copy.deepcopy(model)
    fastlora.patch(model, rank=3, targets=("q", "v", "o", "fc1"))
    model.double()  # the fp32 masters too
    randomise_adapters(model)
    ours = features(model, images.double(), tokens)
    (ours[0].square().sum() + ours[1].square().sum()).backward()

    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves = {n: p.detach().clone().requires_grad_() for n, p in adapters.items()}
    weights = dict(plain.named_parameters())
    overrides = {}
    for path, layer in lora_layers(model):
        if not layer.adapted:
            continue
        a, b = leaves[f"{path}.lora_A"], leaves[f"{path}.lora_B"]
        name = f"{path}.in_proj_weight" if f"{path}.in_proj_weight" in weights else f"{path}.weight"
        parts = list(weights[name].chunk(len(layer.spec.active)))
        for i, (a_g, b_g) in zip(
            [i for i, on in enumerate(layer.spec.active) if on], zip(a, b.chunk(len(a)), strict=True), strict=True
        ):
            parts[i] = parts[i] + layer.spec.scale * b_g @ a_g
        overrides[name] = torch.cat(parts)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = plain

        def forward(self) -> Tensor:
            image, text = features(self.clip, images.double(), tokens)
            return image.square().sum() + text.square().sum()

    torch.func.functional_call(Both(), {f"clip.{n}": w for n, w in overrides.items()}).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(adapters[name].grad, leaf.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_plain_checkpoint_loads_strictly() -> None:
    model, other = tiny(0), tiny(1)
    fastlora.patch(model)
    randomise_adapters(model)
    adapters = [p.detach().clone() for p in fastlora.lora_parameters(model)]
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(
        model.visual.transformer.resblocks[0].attn.in_proj_weight, other.visual.transformer.resblocks[0].attn.in_proj_weight
    )
    assert all(torch.equal(a, b) for a, b in zip(adapters, fastlora.lora_parameters(model), strict=True))


def test_state_dict_round_trip() -> None:
    model, other = tiny(), tiny()
    for m in (model, other):
        fastlora.patch(m)
    randomise_adapters(model)
    other.load_state_dict(model.state_dict())
    assert_same_state(other, snapshot(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_whole(copied: Any) -> None:
    model = tiny()
    images, tokens = inputs(model)
    plain = features(model, images, tokens)
    fastlora.patch(model)
    randomise_adapters(model)
    expected = features(model, images, tokens)
    twin = copied(model)
    for now, then in zip(features(twin, images, tokens), expected, strict=True):
        assert torch.equal(now, then)
    fastlora.unpatch(twin)
    for now, then in zip(features(twin, images, tokens), plain, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(features(model, images, tokens)[0], expected[0])  # the first is untouched


def test_hooks_and_training_mode_survive() -> None:
    model = tiny().train()
    calls = []
    model.visual.transformer.resblocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    fastlora.patch(model)
    assert model.visual.transformer.resblocks[0].attn.training
    model.encode_image(inputs(model)[0])
    model.eval()
    fastlora.unpatch(model)
    assert not model.visual.transformer.resblocks[0].attn.training
    model.encode_image(inputs(model)[0])
    assert len(calls) == 2


def test_moved_and_cast_after_patch() -> None:
    model = tiny()
    fastlora.patch(model)
    model.double()
    fastlora.unpatch(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_merge_then_train_is_refused() -> None:
    model = tiny().train()
    fastlora.patch(model)
    fastlora.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        model.encode_image(inputs(model)[0])


@pytest.mark.parametrize("verb", [fastlora.unpatch, fastlora.merge, fastlora.unmerge, fastlora.lora_parameters])
def test_verbs_need_a_patched_model(verb: Any) -> None:
    with pytest.raises(ValueError, match=r"not patched: call fastlora\.patch"):
        verb(tiny())


def test_unknown_model_is_named() -> None:
    with pytest.raises(TypeError, match=r"does not know torch\.nn.*Linear: looked for open_clip"):
        fastlora.patch(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 65}, "rank 65 is above the width"), ({"layers": (3,)}, "blocks 0 to 2"), ({"rank": 0}, "rank must be")],
    ids=["rank", "layer", "rank-0"],
)
def test_bad_options_leave_the_model_untouched(options: dict[str, Any], message: str) -> None:
    model = tiny()
    modules, state = dict(model.named_modules()), snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastlora.patch(model, **options)
    assert dict(model.named_modules()) == modules
    assert all(p.requires_grad for p in model.parameters())
    assert_same_state(model, state)


def test_a_resnet_tower_is_skipped_and_said_so() -> None:
    from open_clip.model import CLIP

    model = CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        text_cfg={"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
    )
    report = fastlora.patch(model)
    assert "ModifiedResNet has no blocks with attn" in report.skipped["visual"]
    assert all(path.startswith("transformer.") for path in report.patched)
    assert "not adapted: visual" in str(report)


def test_ranks_of_their_own() -> None:
    model = tiny()
    state = snapshot(model)
    report = fastlora.patch(model, targets=("q", "o"), rank_pattern={0: 0, "visual.*.attn": 0, "*.2.attn*": 5})
    layers = {path: layer for path, layer in lora_layers(model) if layer.adapted}
    ranks = {path: layer.adapters()[0].shape[1] for path, layer in layers.items()}
    assert not any(".0." in path for path in ranks)
    # out_proj inside an attention without an adapter has one all the same
    assert ranks["visual.transformer.resblocks.1.attn.out_proj"] == 2
    assert {ranks[path] for path in ranks if ".2." in path} == {5} and "visual.transformer.resblocks.2.attn" not in ranks
    assert layers["transformer.resblocks.2.attn"].spec.scale == pytest.approx(5**-0.5)
    assert "rank 2 or its own" in str(report)
    sum(f.sum() for f in features(model, *inputs(model))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in fastlora.lora_parameters(model))
    fastlora.unpatch(model)
    assert_same_state(model, state)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"visul.*": 4}, "'visul.*', which fits no module"),
        ({3: 4}, "3, which fits no module"),
        ({"*": 0}, "every module rank 0"),
    ],
    ids=["path", "block", "none"],
)
def test_a_rank_pattern_that_fits_nothing_is_told(pattern: Any, message: str) -> None:
    model = tiny()
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        fastlora.patch(model, rank_pattern=pattern)
    assert dict(model.named_modules()) == modules


ATTENTION_CALLS: dict[str, dict[str, Any]] = {
    "self": {},
    "weights": {"need_weights": True},
    "weights-per-head": {"need_weights": True, "average_attn_weights": False},
    "float-mask": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(0))},
    "bool-mask": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "head-mask": {"attn_mask": torch.randn(2 * 4, 5, 5, generator=torch.Generator().manual_seed(0))},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "padding-and-mask": {
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
    },
    "causal-hint": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
}


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "batch-second"])
@pytest.mark.parametrize("call", ATTENTION_CALLS.values(), ids=ATTENTION_CALLS.keys())
def test_attention_options_behave_as_the_hosts(call: dict[str, Any], batch_first: bool) -> None:
    torch.manual_seed(0)
    host = nn.MultiheadAttention(16, 4, batch_first=batch_first).double().eval().requires_grad_(False)
    layer = adopt(host, LoRAConfig(), site=0, active=(True, True, True)).eval()
    x = torch.randn(2, 5, 16).double()
    x = x if batch_first else x.transpose(0, 1)
    call = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    options = {"need_weights": False, **call}
    for query, key, value in ((x, x, x), (x, x.clone(), x.clone())):
        for ours, theirs in zip(layer(query, key, value, **options), host(query, key, value, **options), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


def test_attention_without_a_batch() -> None:
    host = nn.MultiheadAttention(16, 4).double().eval().requires_grad_(False)
    layer = adopt(host, LoRAConfig(), site=0, active=(True, False, True)).eval()
    x = torch.randn(5, 16).double()
    for ours, theirs in zip(layer(x, x, x), host(x, x, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_packed_and_separate_projections_agree_with_adapters() -> None:
    torch.manual_seed(0)
    host = nn.MultiheadAttention(16, 4, batch_first=True).double().requires_grad_(False)
    layer = adopt(host, LoRAConfig(dropout=0.0), site=0, active=(True, False, True)).eval()
    assert isinstance(layer, LoRAMultiheadAttention)
    randomise_adapters(layer)
    x = torch.randn(2, 5, 16).double()
    torch.testing.assert_close(layer(x, x.clone(), x.clone())[0], layer(x, x, x)[0])
    torch.testing.assert_close(layer.project_group(x, 1, 3), layer.project_qkv(x)[..., 16:])


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_attention_that_cannot_be_adapted_is_refused(options: dict[str, Any]) -> None:
    model = tiny()
    width = model.visual.transformer.resblocks[1].attn.embed_dim
    model.visual.transformer.resblocks[1].attn = nn.MultiheadAttention(width, 2, batch_first=True, **options)
    report = fastlora.patch(model)
    assert list(report.skipped) == ["visual.transformer.resblocks.1.attn"]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default(request: pytest.FixtureRequest) -> Any:
    """torch's default dtype, while a test runs."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["default", "other"])
def test_masters_are_fp32_under_any_default_dtype(default: torch.dtype, name: str) -> None:
    model = tiny()
    assert model.ln_final.weight.dtype == default
    torch.manual_seed(3)
    fastlora.add_adapter(model, name, targets=("q", "o", "fc1"))
    torch.set_default_dtype(torch.float32)
    other = tiny()
    torch.manual_seed(3)
    fastlora.add_adapter(other, name, targets=("q", "o", "fc1"))
    for ours, theirs in zip(fastlora.lora_parameters(model), fastlora.lora_parameters(other), strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_masters_of_a_model_without_memory() -> None:
    """On the meta device, or under it as the default one, adapters are where their weights are."""
    with torch.device("meta"):
        empty = tiny()
    fastlora.patch(empty)
    assert {(p.device.type, p.dtype) for p in fastlora.lora_parameters(empty)} == {("meta", torch.float32)}
    model = tiny()
    with torch.device("meta"):
        fastlora.patch(model)
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in fastlora.lora_parameters(model))


class Full(Exception):
    """Stands for what stops an adapter on its way: a full memory, an interrupt."""


def stop_at(call: int, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Let LoRALayer's method raise at one of its calls."""
    real, calls = getattr(LoRALayer, method), itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise Full
        return real(*args, **kwargs)

    monkeypatch.setattr(LoRALayer, method, counted)


@pytest.mark.parametrize("call", [1, 4, 12])
def test_patch_that_is_stopped_changes_nothing(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave q, k and v of transformers' attention in one piece of memory."""
    model = transformers_twin(open_clip_twin())
    modules, state = dict(model.named_modules()), snapshot(model)
    addresses = [p.data_ptr() for p in model.parameters()]
    stop_at(call, monkeypatch, "add")
    with pytest.raises(Full):
        fastlora.patch(model, targets=("q", "o"))
    assert dict(model.named_modules()) == modules and all(p.requires_grad for p in model.parameters())
    assert_same_state(model, state)
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(addresses)


@pytest.mark.parametrize("name", ["default", "third"])
@pytest.mark.parametrize("call", [1, 4, 12])
def test_an_adapter_that_is_stopped_leaves_the_others(call: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its modules have adapters already, half have none."""
    model = tiny()
    fastlora.add_adapter(model, "first", encoders="text")
    fastlora.add_adapter(model, "second", targets="fc1")
    randomise_adapters(model)
    modules, state = dict(model.named_modules()), snapshot(model)
    flags = [p.requires_grad for p in model.parameters()]
    stop_at(call, monkeypatch, "add")
    with pytest.raises(Full):
        fastlora.add_adapter(model, name, targets=("q", "fc1"))
    assert dict(model.named_modules()) == modules and [p.requires_grad for p in model.parameters()] == flags
    assert_same_state(model, state)
    monkeypatch.undo()
    assert fastlora.add_adapter(model, name, targets=("q", "fc1")).patched


def test_a_rank_too_large_for_the_last_module() -> None:
    model = tiny()
    last = model.visual.transformer.resblocks[2].mlp
    last.c_fc, last.c_proj = nn.Linear(64, 4), nn.Linear(4, 64)
    fastlora.patch(model, encoders="text")
    modules, state = dict(model.named_modules()), snapshot(model)
    with pytest.raises(ValueError, match=r"rank 5 is above the width: a weight here is \(4, 64\)"):
        fastlora.add_adapter(model, "second", rank=5, targets=("q", "fc1"))
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_merge_that_is_stopped_is_undone(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    fastlora.patch(model)
    randomise_adapters(model)
    state = snapshot(model)
    stop_at(call, monkeypatch, "merge")
    with pytest.raises(Full):
        fastlora.merge(model)
    assert_same_state(model, state)
    assert not any(layer.merged for _, layer in lora_layers(model))


@pytest.mark.parametrize("verb", [fastlora.unpatch, fastlora.merge, fastlora.unmerge])
@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
def test_an_attention_that_was_replaced_stops_a_verb_at_once(verb: Any, merged: bool) -> None:
    model = tiny()
    fastlora.patch(model)
    randomise_adapters(model)
    if merged:
        fastlora.merge(model)
    block = model.visual.transformer.resblocks[2]
    block.attn = nn.MultiheadAttention(64, 2, batch_first=True)
    modules, state = dict(model.named_modules()), snapshot(model)
    with pytest.raises(ValueError, match=r"visual\.transformer\.resblocks\.2\.attn has lost its adapter"):
        verb(model)
    assert dict(model.named_modules()) == modules
    assert_same_state(model, state)
