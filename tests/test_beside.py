"""What is trained beside the adapters is saved with them and put back: heads, temperatures, norms, new modules, statistics."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from models import inputs, randomise_adapters, tiny
from twins import open_clip_twin, transformers_twin

# PEFT 0.21 asks transformers 5 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and a head with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.up, self.norm = nn.Embedding(5, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.embedding(ids)))) * self.temperature


def vit(classes: int = 7) -> Any:
    import timm

    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=classes, depth=2).eval()


def clip() -> Any:
    return transformers_twin(open_clip_twin())


def resnet() -> Any:
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
    return CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()


def out(model: Any) -> Tensor:
    """All that a model gives, in one row."""
    if isinstance(model, Tied):
        return model(torch.arange(5)).flatten()
    images, tokens = inputs(tiny())
    if hasattr(model, "encode_image"):
        return torch.cat([t.flatten() for t in (*model(images, tokens[:, :16])[:2], model.logit_scale.exp())])
    if hasattr(model, "logit_scale"):
        found = model(pixel_values=images, input_ids=tokens)
        return torch.cat([found.logits_per_image.flatten(), found.image_embeds.flatten(), found.text_embeds.flatten()])
    return model(images).flatten()


def train(model: Any, names: tuple[str, ...], seed: int = 1, **options: Any) -> Any:
    """Patch `model`, and give the adapter and the parameters called so other values, as training does."""
    fastlora.patch(model, **options)
    randomise_adapters(model)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        parameter = model.get_parameter(name).requires_grad_(True)
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def listed(path: Path) -> dict[str, bool]:
    """What a file says was trained beside its adapter."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["fastlora"]).get("beside", {})


HEAD = ("head.weight", "head.bias")
TRAINED: dict[str, tuple[Callable[[], Any], tuple[str, ...], dict[str, Any]]] = {
    "a timm head": (vit, HEAD, {}),
    "norms' biases": (vit, ("blocks.0.norm1.bias", "blocks.1.norm2.bias", "norm.bias"), {}),
    "class token": (vit, ("cls_token",), {}),
    "logit_scale": (tiny, ("logit_scale",), {}),
    "open_clip's projections": (tiny, ("visual.proj", "text_projection", "ln_final.weight"), {}),
    "transformers' projection": (clip, ("visual_projection.weight", "vision_model.post_layernorm.bias"), {}),
    "an attention's norm": (clip, ("text_model.encoder.layers.0.layer_norm1.weight", "logit_scale"), {}),
    "tied weights": (Tied, ("embedding.weight",), {"modules": "up"}),
    "a parameter of the model": (Tied, ("temperature",), {"modules": "up"}),
}


@pytest.mark.parametrize(("build", "names", "options"), TRAINED.values(), ids=TRAINED.keys())
def test_what_was_trained_comes_back(build: Any, names: tuple[str, ...], options: dict[str, Any], tmp_path: Path) -> None:
    model, other, plain = train(build(), names, **options).eval(), build().eval(), build().eval()
    path = tmp_path / "adapter.safetensors"
    fastlora.save(model, path)
    assert set(names) <= set(listed(path)) and all(listed(path)[name] for name in names)
    flags = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    with torch.no_grad():
        fastlora.load(other, path)
        assert torch.equal(out(other), out(model)) and not torch.allclose(out(other), out(plain))
        trainable = {name for name, parameter in other.named_parameters() if parameter.requires_grad}
        assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with fastlora.disabled(other):
            torch.testing.assert_close(out(other), out(plain))
        assert torch.equal(out(other), out(model))
        fastlora.unpatch(other)
        assert torch.equal(out(other), out(plain))
    assert {name: parameter.requires_grad for name, parameter in other.named_parameters()} == flags


def test_an_adapter_alone_is_the_file_it_was(tmp_path: Path) -> None:
    model = train(tiny(), ())
    fastlora.save(model, tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        assert set(json.loads(file.metadata()["fastlora"])) == {"format", "config", "base", "network"}
        assert {name.rpartition(".")[2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118 - not a dict


def test_a_new_module_comes_back_where_there_is_room(tmp_path: Path) -> None:
    """A head put in place after patch, and one of the user's own beside it."""
    model = train(vit(), ())
    torch.manual_seed(4)
    model.head, model.second = nn.Linear(192, 3), nn.Sequential(nn.Linear(192, 2), nn.BatchNorm1d(2))
    model.second(torch.randn(8, 192))  # its statistics move
    model.eval()
    fastlora.save(model, tmp_path / "a")
    wanted = {"head.weight", "second.0.bias", "second.1.running_var", "second.1.num_batches_tracked"}
    assert wanted < set(listed(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"head\.bias, trained beside the adapter, is \(3,\), here \(7,\)"):
        fastlora.load(vit(), tmp_path / "a")
    other = vit()
    other.head = nn.Linear(192, 3)
    with pytest.raises(ValueError, match=r"second\.0\.bias was trained beside the adapter, and this one has no second"):
        fastlora.load(other, tmp_path / "a")
    other.second = nn.Sequential(nn.Linear(192, 2), nn.BatchNorm1d(2)).eval()
    fastlora.load(other, tmp_path / "a")
    x = torch.randn(2, 192)
    assert torch.equal(out(other), out(model)) and torch.equal(other.second(x), model.second(x))


def freeze(model: nn.Module) -> None:
    model.requires_grad_(False)


def half(model: nn.Module) -> None:
    model.requires_grad_(False).half()


@pytest.mark.parametrize("then", [freeze, half], ids=["frozen", "half"])
@pytest.mark.parametrize("name", ["head.weight", "head.bias", "pos_embed"])
def test_what_was_frozen_again_is_known_by_its_value(name: str, then: Callable[[nn.Module], None], tmp_path: Path) -> None:
    model = train(vit(), (name,))
    then(model)
    fastlora.save(model, tmp_path / "a")
    assert listed(tmp_path / "a") == {name: False}
    other = vit()
    fastlora.load(other, tmp_path / "a")
    assert torch.equal(other.get_parameter(name), model.get_parameter(name).float())
    assert not other.get_parameter(name).requires_grad


def test_one_row_of_an_embedding_is_enough(tmp_path: Path) -> None:
    model = train(tiny(), ())
    with torch.no_grad():
        model.token_embedding.weight[17, 5] += 1e-4
    fastlora.save(model, tmp_path / "a")
    assert listed(tmp_path / "a") == {"token_embedding.weight": False}


def test_another_base_is_no_training(tmp_path: Path) -> None:
    """A checkpoint that is loaded after patch replaces everything; only what requires a gradient is trained beside."""
    model = train(tiny(), ("logit_scale",))
    model.load_state_dict(tiny(seed=1).state_dict())
    fastlora.save(model, tmp_path / "a")
    assert listed(tmp_path / "a") == {"logit_scale": True}
    model.load_state_dict(tiny().state_dict())  # and its own again changes nothing
    model.logit_scale.requires_grad_(False)
    fastlora.save(model, tmp_path / "a")
    assert listed(tmp_path / "a") == {}


def test_statistics_that_moved_in_a_frozen_tower(tmp_path: Path) -> None:
    model, other = train(resnet(), ()), resnet()
    model.train().encode_image(torch.randn(4, 3, 32, 32))
    fastlora.save(model.eval(), tmp_path / "a")
    fastlora.load(other, tmp_path / "a")
    assert torch.equal(out(other), out(model)) and not torch.allclose(out(other)[:64], out(resnet())[:64])


def test_a_merged_model_saves_its_own_weights(tmp_path: Path) -> None:
    """Merging changes weights that a mark knows: that is no training, and no other base."""
    model = train(vit(), HEAD)
    freeze(model)
    fastlora.save(model, tmp_path / "a")
    fastlora.merge(model)
    fastlora.save(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    fastlora.save(model, tmp_path / "merged.safetensors", format="merged")
    plain = vit()
    plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(out(plain), out(model))


@pytest.fixture
def two(tmp_path: Path) -> Any:
    """A model with "a" and "b" (active), each with a head of its own, and what each gives alone; None is the plain one."""
    model, alone = vit(), {None: out(vit())}
    for seed, name in enumerate("ab", 1):
        single = train(vit(), HEAD, seed, rank=seed)
        alone[name] = out(single)
        fastlora.save(single, tmp_path / name)
        fastlora.load(model, tmp_path / name, adapter=name)
    return model, alone


@torch.no_grad()
def test_a_head_comes_and_goes_with_its_adapter(two: Any, tmp_path: Path) -> None:
    model, alone = two
    for name in ("b", "a", None, "b"):
        fastlora.set_adapter(model, name)
        torch.testing.assert_close(out(model), alone[name])
        assert model.head.weight.requires_grad == (name is not None)
    for merge in (False, True):
        if merge:
            fastlora.merge(model)
        with fastlora.disabled(model):
            torch.testing.assert_close(out(model), alone[None])
        torch.testing.assert_close(out(model), alone["b"])
    fastlora.save(model, tmp_path / "again", adapter="a")
    other = copy.deepcopy(model)
    fastlora.unmerge(model)
    fastlora.delete_adapter(model, "b")
    torch.testing.assert_close(out(model), alone[None])
    fastlora.set_adapter(model, "a")
    torch.testing.assert_close(out(model), alone["a"])
    fastlora.unpatch(other)
    assert torch.equal(out(other), alone[None])
    assert all(parameter.requires_grad for parameter in other.parameters())
    fastlora.load(other, tmp_path / "again")
    torch.testing.assert_close(out(other), alone["a"])


@torch.no_grad()
def test_a_head_that_is_trained_on_is_its_adapters(two: Any, tmp_path: Path) -> None:
    model, alone = two
    model.head.bias += 1
    now = out(model)
    fastlora.set_adapter(model, "a")
    torch.testing.assert_close(out(model), alone["a"])
    fastlora.set_adapter(model, "b")
    torch.testing.assert_close(out(model), now)
    fastlora.load(model, tmp_path / "b", adapter="b")  # the same once more: the file's values are back
    torch.testing.assert_close(out(model), alone["b"])


def test_a_teacher_between_forward_and_backward(two: Any) -> None:
    model, _ = two
    student = out(model.train()).square().sum()
    with torch.no_grad(), fastlora.disabled(model):
        out(model)
    student.backward()
    assert model.head.weight.grad.abs().max() > 0


def test_an_adapter_without_a_head_takes_the_head_away(two: Any, tmp_path: Path) -> None:
    """The file of the same adapter before its head was trained."""
    model, alone = two
    bare = vit()
    fastlora.patch(bare, rank=2)
    fastlora.save(bare, tmp_path / "bare")
    fastlora.load(model, tmp_path / "bare", adapter="b")
    torch.testing.assert_close(out(model), alone[None])


def test_a_head_that_was_replaced_is_not_overwritten(two: Any, tmp_path: Path) -> None:
    model, _ = two
    model.head = nn.Linear(192, 3)
    modules = dict(model.named_modules())
    for verb in (
        functools.partial(fastlora.set_adapter, model, "a"),
        functools.partial(fastlora.add_adapter, model, "c"),
        functools.partial(fastlora.load, model, tmp_path / "a", adapter="c"),
        functools.partial(fastlora.load, model, tmp_path / "b", adapter="b"),
        fastlora.disabled(model).__enter__,
    ):
        with pytest.raises(ValueError, match=r"head\.bias was loaded with an adapter, and its module was replaced since"):
            verb()
        assert dict(model.named_modules()) == modules
    fastlora.unpatch(model)
    assert model.head.out_features == 3


def test_unpatch_without_the_parameters_that_were_frozen() -> None:
    model = train(vit(), ())
    model.head = nn.Identity()
    fastlora.unpatch(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("build", "name", "form", "message"),
    [
        (tiny, "logit_scale", "clip-lora", "nothing beside the adapter: logit_scale would be lost"),
        (tiny, "ln_final.weight", "peft", r"cannot hold ln_final\.weight.*names of transformers' CLIPModel"),
        (clip, "logit_scale", "peft", r"cannot hold logit_scale.*a parameter of the model itself"),
        (vit, "cls_token", "peft", r"cannot hold cls_token.*a parameter of the model itself"),
        (clip, "text_model.encoder.layers.0.self_attn.q_proj.bias", "peft", r"layers\.0\.self_attn\.q_proj has an adapter"),
    ],
)
def test_a_format_without_room_refuses_by_name(build: Any, name: str, form: Any, message: str, tmp_path: Path) -> None:
    model = train(build(), (name,))
    with pytest.raises(ValueError, match=message):
        fastlora.save(model, tmp_path / "x", format=form)
    assert not list(tmp_path.iterdir())


PEFT: dict[str, tuple[Callable[[], Any], tuple[str, ...], list[str]]] = {
    "timm": (vit, ("head.weight", "norm.bias"), ["head", "norm"]),
    "norms of blocks": (vit, ("blocks.0.norm1.weight", "blocks.1.norm1.bias"), ["blocks.0.norm1", "blocks.1.norm1"]),
    "transformers": (
        clip,
        ("visual_projection.weight", "text_model.final_layer_norm.bias"),
        ["text_model.final_layer_norm", "visual_projection"],
    ),
}


def run(model: Any) -> Tensor:
    """What PEFT's model gives."""
    return out(model.base_model.model.eval())


@torch.no_grad()
@pytest.mark.parametrize(("build", "names", "modules"), PEFT.values(), ids=PEFT.keys())
def test_heads_in_peft_and_back(build: Any, names: tuple[str, ...], modules: list[str], tmp_path: Path) -> None:
    from peft import PeftModel

    model, other = train(build(), names).eval(), build().eval()
    fastlora.save(model, tmp_path / "p", format="peft")
    assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["modules_to_save"] == modules
    torch.testing.assert_close(run(PeftModel.from_pretrained(build(), str(tmp_path / "p"))), out(model), rtol=1e-4, atol=1e-4)
    fastlora.load(other, tmp_path / "p")
    torch.testing.assert_close(out(other), out(model))
    assert all(other.get_parameter(name).requires_grad for name in names)


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "targets", "modules"),
    [(vit, ["qkv"], ["head"]), (vit, ["qkv", "fc1"], ["norm1", "head"]), (clip, ["q_proj"], ["visual_projection"])],
    ids=["timm", "endings", "transformers"],
)
def test_pefts_heads_here(build: Any, targets: list[str], modules: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    theirs, ours = get_peft_model(build(), LoraConfig(target_modules=targets, modules_to_save=modules)), build().eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(str(tmp_path))
    fastlora.load(ours, tmp_path)
    torch.testing.assert_close(out(ours), run(theirs), rtol=1e-4, atol=1e-4)
    fastlora.unpatch(ours)
    assert torch.equal(out(ours), out(build().eval()))
    # a file that lacks a part of what its config names
    found = load_file(tmp_path / "adapter_model.safetensors")
    del found[next(name for name in found if "lora" not in name and name.endswith("weight"))]
    save_file(found, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is damaged: its config has modules_to_save"):
        fastlora.load(ours, tmp_path)


def test_a_file_of_an_untied_model_is_refused_by_a_tied_one(tmp_path: Path) -> None:
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    train(untied, ("head.weight", "embedding.weight"), modules="up")
    fastlora.save(untied, tmp_path / "a")
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight differ, and are one parameter here"):
        fastlora.load(Tied(), tmp_path / "a")


def test_values_that_a_half_precision_model_cannot_hold(tmp_path: Path) -> None:
    model = train(tiny(), ("logit_scale",))
    with torch.no_grad():
        model.logit_scale.fill_(1e6)
    fastlora.save(model, tmp_path / "a")
    other = tiny().half()
    with pytest.raises(ValueError, match="logit_scale holds NaN or infinite values, at least in float16"):
        fastlora.load(other, tmp_path / "a")
    assert other.logit_scale.requires_grad and fastlora.load(tiny().bfloat16(), tmp_path / "a").patched


REPORTS: dict[str, tuple[Callable[[], Any], set[str], str]] = {
    "timm": (vit, {"head", "norm", "cls_token", "patch_embed"}, "frozen: head, norm, "),
    "open_clip": (tiny, {"logit_scale", "visual.proj", "ln_final"}, "frozen: text_projection, visual.proj, logit_scale, "),
    "transformers": (
        clip,
        {"visual_projection", "text_projection"},
        "frozen: text_projection, visual_projection, logit_scale, ",
    ),
}


@pytest.mark.parametrize(("build", "frozen", "line"), REPORTS.values(), ids=REPORTS.keys())
def test_the_report_names_what_was_frozen(build: Any, frozen: set[str], line: str) -> None:
    model = build()
    report = fastlora.patch(model)
    assert frozen <= set(report.frozen) and line in str(report)
    assert "set requires_grad on it after patch" in str(report) and str(report).count("\n") == 1
    inside = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(any(f"{name}.".startswith(f"{path}.") for path in report.frozen) for name in inside)
    assert not any(
        name.startswith(f"{path}.") for name, p in model.named_parameters() if p.requires_grad for path in report.frozen
    )


def test_the_report_leaves_out_what_was_frozen_before() -> None:
    model = vit()
    model.head.requires_grad_(False)
    report = fastlora.patch(model)
    assert "head" not in report.frozen and "frozen: norm, " in str(report)


@pytest.mark.parametrize("how", ["average", "half and back"])
def test_a_head_is_told_from_what_rounding_moved(tmp_path: Path, how: str) -> None:
    """An average of models moves frozen weights by an ulp; the head in it is trained, and requires no gradient."""
    model = train(vit(), HEAD)
    freeze(model)
    if how == "average":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.9 * parameter + 0.1 * parameter)
    else:
        model.half().float()
    fastlora.save(model, tmp_path / "a")
    fresh = vit()
    fastlora.load(fresh, tmp_path / "a", check_base=False)
    assert torch.equal(fresh.head.weight, model.head.weight)
    with safe_open(tmp_path / "a", "pt") as file:
        assert {name for name in file.keys() if "lora" not in name} == set(HEAD)  # noqa: SIM118 - not a dict
