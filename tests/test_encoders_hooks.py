"""The encoders beside other people's hooks and forwards: whatever is put anywhere in a tower runs, at once and later."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import open_clip.transformer
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

import fastlora
from fastlora.encoders import ImageEncoder, TextEncoder, plan
from models import inputs, randomise_adapters, tiny

PLACES = {
    "vision": ("conv1", "ln_pre", "transformer", "ln_post", "patch_dropout", "resblocks.0", "attn", "out_proj", "ln_1", "ln_2"),
    "text": ("token_embedding", "transformer", "ln_final", "resblocks.0", "attn", "out_proj", "ln_1", "ln_2"),
}
IN_BOTH = ("mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "ls_1", "ls_2")


def patched() -> Any:
    model = tiny()
    fastlora.patch(model, dropout=0.0, targets=("q", "v", "fc1"))
    randomise_adapters(model)
    return model


def module_at(model: Any, encoder: str, place: str) -> nn.Module:
    """A module of the tower; of its second block where no place above the blocks has this name."""
    root = model.visual if encoder == "vision" else model
    if place.startswith("resblocks"):
        return root.transformer.get_submodule(place)
    if hasattr(root, place):
        return getattr(root, place)
    block = root.transformer.resblocks[1]
    return block.get_submodule("attn.out_proj" if place == "out_proj" else place)


def own_features(model: Any, encoder: str) -> Tensor:
    images, tokens = inputs(model)
    return model.encode_image(images) if encoder == "vision" else model.encode_text(tokens)


def made(model: Any, encoder: str) -> Callable[[], Tensor]:
    images, tokens = inputs(model)
    if encoder == "text":
        return TextEncoder(model, tokens)
    image_encoder = ImageEncoder(model)
    return lambda: image_encoder(images)


def shifted(out: Any) -> Any:
    return (shifted(out[0]), *out[1:]) if isinstance(out, tuple) else out * 1.5 + torch.linspace(0, 1, out.shape[-1])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("encoder", "place"), [(e, p) for e, places in PLACES.items() for p in places + IN_BOTH])
def test_a_hook_anywhere_runs(encoder: str, place: str, when: str) -> None:
    model = patched()
    encode = made(model, encoder)
    untouched = encode()
    assert not plan(model).vision.startswith("the host") and not plan(model).text.startswith("the host")
    hook = module_at(model, encoder, place).register_forward_hook(lambda module, args, out: shifted(out))
    encode = made(model, encoder) if when == "before" else encode
    got, want = encode(), own_features(model, encoder)
    assert torch.equal(got, want) and not torch.allclose(got, untouched, atol=1e-3)
    said = plan(model).vision if encoder == "vision" else plan(model).text
    assert said.startswith("the host's own method: a forward hook on ") and "would not run" in said
    if when == "after":
        hook.remove()
        assert torch.equal(encode(), untouched)


REGISTER: dict[str, Callable[[nn.Module, list[Any]], Any]] = {
    "pre": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "backward-pre": lambda module, seen: module.register_full_backward_pre_hook(lambda *_: seen.append(1)),
    "global": lambda _, seen: register_module_forward_hook(lambda *_: seen.append(1)),
    "global-pre": lambda _, seen: register_module_forward_pre_hook(lambda *_: seen.append(1)),
    "global-backward": lambda _, seen: register_module_full_backward_hook(lambda *_: seen.append(1)),
}


# torch says so of the first block, whose input is frozen
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER.keys())
@pytest.mark.parametrize("encoder", ["vision", "text"])
def test_every_kind_of_hook_runs_as_often_as_in_the_host(encoder: str, register: Any) -> None:
    model, counts = patched(), []
    encode = made(model, encoder)
    for run in (encode, lambda: own_features(model, encoder)):
        seen: list[Any] = []
        hook = register(module_at(model, encoder, "mlp"), seen)
        try:
            run().sum().backward()
        finally:
            hook.remove()
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0


class Doubled(nn.Linear):
    """A Linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def replace_method(module: Any, name: str) -> None:
    old = getattr(module, name)
    setattr(module, name, types.MethodType(lambda self, *args, **options: shifted(old(*args, **options)), module))


def mix_tokens(block: Any) -> None:
    class Mix(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.mean(1, keepdim=True)

    block.ls_2 = Mix()


def swap_class(module: Any) -> None:
    module.__class__ = Doubled


CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "forward of the mlp": ("mlp", lambda module: replace_method(module, "forward")),
    "forward of gelu": ("mlp.gelu", lambda module: replace_method(module, "forward")),
    "forward of c_proj": ("mlp.c_proj", lambda module: replace_method(module, "forward")),
    "forward of out_proj": ("out_proj", lambda module: replace_method(module, "forward")),
    "forward of an adapted fc1": ("mlp.c_fc", lambda module: replace_method(module, "forward")),
    "forward of attention": ("attn", lambda module: replace_method(module, "forward")),
    "forward of the transformer": ("transformer", lambda module: replace_method(module, "forward")),
    "attention of a block": ("resblocks.0", lambda module: replace_method(module, "attention")),
    "class of a linear": ("mlp.c_proj", swap_class),
    "a module that mixes tokens": ("resblocks.0", mix_tokens),
    "parametrization": (
        "mlp.c_proj",
        lambda module: nn.utils.parametrize.register_parametrization(module, "weight", Halved()) and None,
    ),
    "weight norm by hooks": ("mlp.c_proj", lambda module: module.register_forward_pre_hook(double_weight) and None),
}


def double_weight(module: Any, _: Any) -> None:
    module.weight.data.mul_(1.0)
    module.bias.data.fill_(3.0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("encoder", ["vision", "text"])
@pytest.mark.parametrize(("place", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_what_was_replaced_counts(place: str, change: Any, encoder: str, when: str) -> None:
    model = patched()
    encode = made(model, encoder)
    untouched = encode()
    change(module_at(model, encoder, place))
    encode = made(model, encoder) if when == "before" else encode
    got = encode()
    assert torch.equal(got, own_features(model, encoder)) and not torch.allclose(got, untouched, atol=1e-3)


def test_what_is_replaced_on_a_class_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched()
    encoders = [made(model, encoder) for encoder in ("vision", "text")]
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x.relu())
    for encode, encoder in zip(encoders, ("vision", "text"), strict=True):
        assert torch.equal(encode(), own_features(model, encoder))
    assert "mlp.gelu (GELU) has its own forward, which is not known here" in plan(model).text
    monkeypatch.undo()
    monkeypatch.setattr(open_clip.transformer.ResidualAttentionBlock, "attention", lambda self, q_x, **_: q_x)
    for encode, encoder in zip(encoders, ("vision", "text"), strict=True):
        assert torch.equal(encode(), own_features(model, encoder))


def test_a_tower_or_block_or_method_that_is_replaced_later_counts() -> None:
    model, other = patched(), tiny(seed=5)
    encoders = [made(model, encoder) for encoder in ("vision", "text")]
    before = [encode() for encode in encoders]
    model.transformer.resblocks[1] = other.transformer.resblocks[1]
    model.visual = other.visual
    for encode, encoder, untouched in zip(encoders, ("vision", "text"), before, strict=True):
        got = encode()
        assert torch.equal(got, own_features(model, encoder)) and not torch.allclose(got, untouched, atol=1e-3)
    model.encode_image = lambda images, normalize=False: torch.zeros(2, 32)
    assert not encoders[0]().any()


def test_attention_that_drops_out_by_a_later_train_counts() -> None:
    model = patched()
    for block in model.visual.transformer.resblocks:
        block.attn.dropout = 0.5
    encode = made(model, "vision")
    model.train()
    torch.manual_seed(0)
    got = encode()
    torch.manual_seed(0)
    assert torch.equal(got, own_features(model, "vision")) and not torch.equal(got, encode())
