"""Weights that know their adapter: whoever reads one, from wherever, gets the adapter's update or an error, never silence."""

from __future__ import annotations

import copy
import io
import types
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
import stand_ins
from models import inputs, randomise_adapters, tiny
from test_hosts import small_clip

D = 64  # width of the tiny vision tower
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))


def patched(**options: Any) -> Any:
    model = tiny()
    fastlora.patch(model, dropout=0.0, **options)
    randomise_adapters(model)
    return model


def attention(model: Any) -> Any:
    return model.visual.transformer.resblocks[-1].attn


def merged_weight(layer: Any) -> Tensor:
    return layer.merged_weight().to(layer.base_weight.dtype)


READ: dict[str, Callable[[Any], tuple[Tensor, slice]]] = {
    "whole": lambda attn: (F.linear(X, attn.in_proj_weight, attn.in_proj_bias), slice(0, 3)),
    "values": lambda attn: (F.linear(X, attn.in_proj_weight[2 * D :], attn.in_proj_bias[2 * D :]), slice(2, 3)),
    "keys-and-values": lambda attn: (F.linear(X, attn.in_proj_weight[D:, :], attn.in_proj_bias[D:]), slice(1, 3)),
    "chunk": lambda attn: (F.linear(X, attn.in_proj_weight.chunk(3)[1], attn.in_proj_bias.chunk(3)[1]), slice(1, 2)),
    "split": lambda attn: (F.linear(X, torch.split(attn.in_proj_weight, D)[0], attn.in_proj_bias[:D]), slice(0, 1)),
    "chunk-of-rows": lambda attn: (
        F.linear(X, attn.in_proj_weight[D:].chunk(2)[1], attn.in_proj_bias[2 * D :]),
        slice(2, 3),
    ),
    "narrow": lambda attn: (F.linear(X, attn.in_proj_weight.narrow(0, D, D), attn.in_proj_bias[D : 2 * D]), slice(1, 2)),
}


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
def test_a_linear_on_the_weight_counts(read: Any) -> None:
    """Whole, or cut into rows of q, k, v: what dense features of MaskCLIP's kind do."""
    model = patched()
    layer = attention(model)
    got, groups = read(layer)
    rows = slice(groups.start * D, groups.stop * D)
    torch.testing.assert_close(got, F.linear(X, merged_weight(layer)[rows], layer.in_proj_bias[rows]))
    with fastlora.disabled(model):
        assert torch.equal(read(layer)[0], F.linear(X, layer.in_proj_weight.detach()[rows], layer.in_proj_bias[rows]))


def test_its_gradients_are_those_of_the_module() -> None:
    layer = attention(patched())
    gradients = []
    for run in (layer.project_qkv, lambda x: F.linear(x, layer.in_proj_weight, layer.in_proj_bias)):
        gradients.append(torch.autograd.grad(run(X).sin().sum(), layer.adapters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


ELSEWHERE: dict[str, Callable[[Any], object]] = {
    "operator": lambda attn: X @ attn.in_proj_weight.T,
    "matmul-of-values": lambda attn: attn.in_proj_weight[2 * D :] @ X.mT,
    "einsum": lambda attn: torch.einsum("bld,nd->bln", X, attn.in_proj_weight),
    "convolution": lambda attn: F.conv1d(X.mT, attn.in_proj_weight[2 * D :, :, None]),
    "half-of-the-heads": lambda attn: F.linear(X, attn.in_proj_weight[: D // 2]),
    "copy": lambda attn: F.linear(X, attn.in_proj_weight.clone()),
    "cast": lambda attn: F.linear(X.double(), attn.in_proj_weight.double()),
    "scaled": lambda attn: F.linear(X, attn.in_proj_weight * 0.5),
    "joined": lambda attn: F.linear(X, torch.cat([attn.in_proj_weight[D:], attn.in_proj_weight[:D]])),
    "by-head": lambda attn: X @ attn.in_proj_weight.view(3, D, D)[2],
    "new-parameter": lambda attn: nn.Parameter(attn.in_proj_weight[2 * D :].clone()),
    "attention-of-other-heads": lambda attn: F.multi_head_attention_forward(
        X, X, X, D, 4, attn.in_proj_weight, attn.in_proj_bias, None, None, False, 0.0, attn.out_proj.weight, None
    ),
}


@pytest.mark.parametrize("read", ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_any_other_product_is_an_error(read: Any) -> None:
    model = patched()
    layer = attention(model)
    with pytest.raises(RuntimeError, match=r"past its adapter.*F.linear on its weight.*fastlora.merge|Creating a Parameter"):
        read(layer)
    fastlora.merge(model)
    if read is not ELSEWHERE["new-parameter"]:
        assert isinstance(read(layer), (Tensor, tuple))  # now the weight itself holds the update


FROZEN: dict[str, Callable[[nn.Parameter], Tensor]] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "detached-rows": lambda w: w[:D].detach(),
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda w: w.new_zeros(3, 3),
    "norm": lambda w: w.norm(),
    "sum-of-rows": lambda w: w.square().sum(0),
    "mean-of-all": lambda w: torch.stack([w.mean(), w.abs().max(), w.std()]),
    "embedding": lambda w: F.embedding(torch.tensor([1, 2]), w),
}


@pytest.mark.parametrize("take", FROZEN.values(), ids=FROZEN.keys())
def test_copies_and_statistics_are_plain(take: Any) -> None:
    layer = attention(patched())
    found = take(layer.in_proj_weight)
    assert type(found) is Tensor and torch.equal(found, take(nn.Parameter(layer.base_weight.clone(), requires_grad=False)))


def test_changes_in_place_and_averages_work_as_ever() -> None:
    layer = attention(patched())
    weight, before = layer.in_proj_weight, layer.in_proj_weight.detach().clone()
    with torch.no_grad():
        assert weight.mul_(2.0) is weight and torch.equal(weight, 2 * before)
        average = before.clone()
        average.lerp_(weight, 0.5)
        torch.testing.assert_close(average, 1.5 * before)
        nn.init.zeros_(weight)
    assert not weight.any() and weight.requires_grad_(True) is weight and weight.grad is None
    assert len(weight) == 3 * D and weight.shape == before.shape and isinstance(weight, nn.Parameter)


def test_the_parameter_is_the_hosts_own_and_plain_again_after_unpatch() -> None:
    model = tiny()
    before = dict(model.named_parameters())
    fastlora.patch(model, targets=("q", "o", "fc1"))
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    fastlora.unpatch(model)
    assert all(type(p) is nn.Parameter and not hasattr(p, "_layer") for p in before.values())
    weight = attention(model).in_proj_weight
    assert type(X @ weight.T) is Tensor


MOVES: dict[str, Callable[[Any], Any]] = {
    "double-and-back": lambda model: model.double().float(),
    "deepcopy": copy.deepcopy,
    "torch.save": lambda model: through_a_file(model),
    "load": lambda model: model.load_state_dict(model.state_dict()) and model,
    "assign": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True) and model,
}


def through_a_file(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False, **options)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_what_moves_or_copies_a_model_leaves_its_weights_knowing(move: Any) -> None:
    model = move(patched())
    layer = attention(model)
    want = F.linear(X, merged_weight(layer), layer.in_proj_bias)
    torch.testing.assert_close(F.linear(X, layer.in_proj_weight, layer.in_proj_bias), want)
    with pytest.raises(RuntimeError, match="past its adapter"):
        X @ layer.in_proj_weight.T


def test_weights_alone_are_saved_as_plain_ones() -> None:
    weight = attention(patched()).in_proj_weight
    for value in (weight, weight[:D], copy.deepcopy(weight), copy.deepcopy(weight[:D])):
        file = io.BytesIO()
        torch.save({"weight": value}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["weight"]
        assert type(loaded) in (Tensor, nn.Parameter) and torch.equal(loaded, value.detach())


def with_maps(self: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """A replaced forward that keeps the attention maps."""
    out, self.map = nn.MultiheadAttention.forward(self, query, key, value, **options | {"need_weights": True})
    return out, self.map


def hooked(module: nn.Module) -> None:
    """As accelerate's hooks: a forward on the instance that calls the old one."""
    old = module.forward
    module.forward = lambda *args, **options: old(*args, **options)  # type: ignore[method-assign]


REPLACED: dict[str, Callable[[nn.Module], None]] = {
    "maps": lambda module: setattr(module, "forward", types.MethodType(with_maps, module)),
    "wrapper": hooked,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED.keys())
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_forward_replaced_on_the_instance_counts_its_adapter(replace: Any, when: str, mode: str) -> None:
    model, same = tiny().train(mode == "train"), tiny().train(mode == "train")
    images, _ = inputs(model)
    for clip in (model, same):
        if clip is model and when == "before":
            for block in clip.visual.transformer.resblocks:
                replace(block.attn)
        torch.manual_seed(3)  # of lora_A
        fastlora.patch(clip, dropout=0.0, targets=("q", "k", "v", "o"))
        randomise_adapters(clip)
    if when == "after":
        for block in model.visual.transformer.resblocks:
            replace(block.attn)
    with torch.set_grad_enabled(mode == "train"):
        torch.testing.assert_close(model.encode_image(images), same.encode_image(images))


def test_torchs_attention_on_the_weights_is_the_modules() -> None:
    """Arguments, masks, maps and layouts of F.multi_head_attention_forward."""
    layer = attention(patched(targets=("q", "k", "v", "o")))
    x, mask = X.transpose(0, 1), torch.full((5, 5), float("-inf")).triu_(1)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[:, -1] = True
    for options in (
        {"attn_mask": mask},
        {"key_padding_mask": padding},
        {"average_attn_weights": False},
        {"need_weights": False},
    ):
        got = F.multi_head_attention_forward(
            x, x, x, D, layer.num_heads, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias, training=False, **options,
        )  # fmt: skip
        want = layer(X, X, X, **options)
        torch.testing.assert_close(got[0].transpose(0, 1), want[0])
        assert (got[1] is None) == (want[1] is None) and (got[1] is None or torch.equal(got[1], want[1]))


def test_projections_of_transformers_count_when_called_one_by_one() -> None:
    model = small_clip()
    fastlora.patch(model, dropout=0.0)
    randomise_adapters(model)
    layer = model.vision_model.encoder.layers[0].self_attn
    x, weight = X[..., :32], merged_weight(layer)
    for i, linear in enumerate((layer.q_proj, layer.k_proj, layer.v_proj)):
        want = F.linear(x, weight[32 * i : 32 * i + 32], linear.bias)
        torch.testing.assert_close(linear(x), want)
        torch.testing.assert_close(F.linear(x, linear.weight), want - linear.bias)
    with pytest.raises(RuntimeError, match="past its adapter"):
        x @ layer.v_proj.weight.T


def test_timms_packed_weight_counts_when_read() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0, img_size=32).eval()
    fastlora.patch(model, dropout=0.0, targets=("q", "k", "v", "fc1"))
    randomise_adapters(model)
    block, x = model.blocks[0], torch.randn(2, 5, 192)
    torch.testing.assert_close(F.linear(x, block.attn.qkv.weight, block.attn.qkv.bias), block.attn.qkv(x))
    torch.testing.assert_close(
        F.linear(x, block.attn.qkv.weight[384:], block.attn.qkv.bias[384:]), block.attn.qkv(x)[..., 384:]
    )
    torch.testing.assert_close(F.linear(x, block.mlp.fc1.weight, block.mlp.fc1.bias), block.mlp.fc1(x))


@pytest.mark.parametrize("make", [small_clip, lambda: stand_ins.CLIP(stand_ins.PackedAttention).eval()], ids=["three", "cut"])
def test_functional_call_with_other_weights_counts_their_adapter(make: Any) -> None:
    """What stands in for a host attention's parameters is no parameter: its projections are known all the same."""
    model, images = make(), torch.randn(2, 3, 32, 32)
    fastlora.patch(model, dropout=0.0)
    randomise_adapters(model)

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return self.model.encode_image(images) if hasattr(model, "encode_image") else self.model.vision_model(images)[1]

    run = Run()
    plain = {name: parameter.detach().clone() for name, parameter in run.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(run, plain, ()), run())
    assert all(type(weight) is Tensor for weight in plain.values())
