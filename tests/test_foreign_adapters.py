"""Adapters of PEFT and of the paper's code: loaded here, and ours there, with the same outputs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from models import features, inputs, randomise_adapters, tiny
from twins import open_clip_twin, transformers_features, transformers_twin

# PEFT 0.21 asks transformers 5 by a name that is going away
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

ALL = ("q", "k", "v", "o", "fc1", "fc2")


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    model = open_clip_twin()
    return model, transformers_twin(model)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> None:
    """Equal to rounding, and far from what the plain model gives."""
    for a, b, c in zip(got, want, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))
        assert (b - c).abs().max() > 0.01 * b.abs().max()


@torch.no_grad()
def test_the_twins_agree(twins: tuple[Any, Any]) -> None:
    batch = inputs(twins[0])
    for ours, theirs in zip(features(twins[0], *batch), transformers_features(twins[1], *batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ALL, "rank": 3, "scaling": "alpha/r", "alpha": 4.0, "layers": (1,)},
        {"targets": ("q", "o"), "rank_pattern": {0: 4, "visual.*": 1}},
    ],
    ids=["paper", "all", "ranks"],
)
@torch.no_grad()
def test_ours_in_peft(twins: tuple[Any, Any], tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import PeftModel

    ours, theirs = copy.deepcopy(twins)
    batch = inputs(ours)
    plain = features(ours, *batch)
    fastlora.patch(ours, **options)
    randomise_adapters(ours)
    fastlora.save(ours, tmp_path / "peft", format="peft")
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(theirs, str(tmp_path / "peft")).eval()
    adapted = transformers_features(loaded.base_model.model, *batch)
    changed = [i for i, tower in enumerate(("visual.", "transformer.")) if any(tower in p for p in _paths(ours))]
    assert changed == [0, 1]
    assert_close(features(ours, *batch), adapted, plain)
    # and back, onto a plain model
    again = copy.deepcopy(twins[0])
    fastlora.load(again, tmp_path / "peft")
    assert_close(features(again, *batch), features(ours, *batch), plain)
    assert len(fastlora.lora_parameters(again)) == len(fastlora.lora_parameters(ours))


def _paths(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("lora_A")]


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "qv": {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 6},
    "rslora-all": {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], "r": 2, "use_rslora": True},
    # nothing of it is a product of targets, encoders and layers
    "uneven": {
        "target_modules": r"vision_model\..*\.1\..*(q_proj|fc1)|text_model\..*\.[02]\..*(k_proj|v_proj)",
        "r": 4, "lora_alpha": 2, "rank_pattern": {"k_proj": 2, "vision_model.*fc1": 3}, "alpha_pattern": {"v_proj": 5},
    },
}  # fmt: skip


def peft_adapter(model: Any, folder: Path, **config: Any) -> Any:
    """PEFT's own adapter on `model`, with B that is not zero, saved to `folder`."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(str(folder))
    return adapted


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
@torch.no_grad()
def test_pefts_here(twins: tuple[Any, Any], tmp_path: Path, config: dict[str, Any]) -> None:
    ours, theirs = copy.deepcopy(twins)
    batch = inputs(ours)
    plain = features(ours, *batch)
    adapted = peft_adapter(theirs, tmp_path, **config)
    fastlora.load(ours, tmp_path)
    want = transformers_features(adapted.base_model.model, *batch)
    assert_close(features(ours, *batch), want, plain)
    fastlora.merge(ours)
    assert_close(features(ours, *batch), want, plain)


def test_filled_parts_stay_zero_in_training(twins: tuple[Any, Any], tmp_path: Path) -> None:
    """v of a packed q, k, v that PEFT did not adapt in this block has zeros, and still has them after two steps."""
    ours, theirs = copy.deepcopy(twins)
    peft_adapter(theirs, tmp_path, target_modules=r".*\.0\..*q_proj|.*\.1\..*v_proj", r=2)
    fastlora.load(ours, tmp_path)
    optimizer = torch.optim.AdamW(fastlora.lora_parameters(ours), lr=0.1)
    batch = inputs(ours)
    for _ in range(2):
        sum(f.square().sum() for f in features(ours.train(), *batch)).backward()  # type: ignore[union-attr]
        optimizer.step()
    layer = ours.transformer.resblocks[0].attn
    assert layer.lora_A[0].abs().min() > 0 and not layer.lora_A[1].any() and not layer.lora_B.chunk(2)[1].any()


def test_an_adapter_that_peft_put_on_a_packed_projection(tmp_path: Path) -> None:
    """PEFT on open_clip's own nn.MultiheadAttention: one A for q, k and v."""
    model = tiny()
    batch = inputs(model)
    plain = features(model, *batch)
    other = copy.deepcopy(model)
    adapted = peft_adapter(copy.deepcopy(model), tmp_path, target_modules=r".*resblocks.*attn", r=2)
    fastlora.load(other, tmp_path)
    with torch.no_grad():
        assert_close(features(other, *batch), features(adapted.base_model.model, *batch), plain)


def paper_file(model: Any, path: Path, encoder: str, position: str, blocks: dict[str, list[int]], **changes: Any) -> None:
    """lora_weights.pt as the paper's code writes it, and the same update added to the dense weights of `model`."""
    generator = torch.Generator().manual_seed(5)
    weights: dict[str, Any] = {}
    rank, alpha = 2, 1.5
    for tower, indices in blocks.items():
        for i in indices:
            block = (model.visual if tower == "vision" else model).transformer.resblocks[i]
            layer = {}
            for j, name in ((0, "q_proj"), (2, "v_proj"), (None, "proj")):
                width = block.attn.embed_dim
                a, b = (torch.randn(s, generator=generator) * 0.3 for s in ((rank, width), (width, rank)))
                layer[name] = {"w_lora_A": a, "w_lora_B": b}
                target = block.attn.out_proj.weight if j is None else block.attn.in_proj_weight[j * width : (j + 1) * width]
                target.data += alpha / math.sqrt(rank) * b @ a
            weights[f"layer_{len(weights)}"] = layer
    metadata = {"r": rank, "alpha": alpha, "encoder": encoder, "params": ["q", "v", "o"], "position": position}
    torch.save({"weights": weights, "metadata": metadata | changes}, path)


@pytest.mark.parametrize(
    ("encoder", "position", "blocks"),
    [
        ("both", "all", {"text": [0, 1, 2], "vision": [0, 1, 2, 3]}),
        ("text", "half-up", {"text": [1, 2]}),
        ("vision", "bottom", {"vision": [0]}),
    ],
)
@torch.no_grad()
def test_the_papers_file(tmp_path: Path, encoder: str, position: str, blocks: dict[str, list[int]]) -> None:
    path = tmp_path / "lora_weights.pt"
    dense, model = tiny(vision_cfg={"layers": 4}), tiny(vision_cfg={"layers": 4})
    batch = inputs(model)
    paper_file(dense, path, encoder, position, blocks)
    report = fastlora.load(model, path)
    assert (report.config.rank, report.config.alpha, report.config.dropout) == (2, 1.5, 0.25)
    assert report.config.layers == position
    want = features(dense, *batch)
    for got, expected in zip(features(model, *batch), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    # written again it is the same file, tensor by tensor
    fastlora.save(model, tmp_path / "again.pt", format="clip-lora")
    first, again = (torch.load(p, weights_only=True) for p in (path, tmp_path / "again.pt"))
    assert first["metadata"] == again["metadata"] and list(first["weights"]) == list(again["weights"])
    for name, layer in first["weights"].items():
        for projection, pair in layer.items():
            assert all(torch.equal(pair[key], again["weights"][name][projection][key]) for key in pair)


def test_the_old_large_model_lacks_three_image_blocks(tmp_path: Path) -> None:
    path = tmp_path / "lora_weights.pt"
    dense, model = tiny(vision_cfg={"layers": 24}), tiny(vision_cfg={"layers": 24})
    paper_file(dense, path, "both", "all", {"text": [0, 1, 2], "vision": list(range(21))})
    report = fastlora.load(model, path)
    assert not any(f".{i}." in p for p in report.patched for i in (21, 22, 23))
    with torch.no_grad():
        for got, want in zip(features(model, *inputs(model)), features(dense, *inputs(model)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {0: 4}}, "one rank for all layers"),
        ({"targets": ("q", "fc1")}, "this adapter is on fc1 too"),
        ({"layers": (0, 2)}, r"this adapter is on blocks \(0, 2\)"),
    ],
    ids=["ranks", "targets", "layers"],
)
def test_what_the_papers_file_cannot_say(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    model = tiny()
    fastlora.patch(model, **options)
    with pytest.raises(ValueError, match=message):
        fastlora.save(model, tmp_path / "x.pt", format="clip-lora")
    assert not list(tmp_path.iterdir())


def test_a_scaling_by_rank_is_the_papers_with_another_alpha(tmp_path: Path) -> None:
    model, other = tiny(), tiny()
    fastlora.patch(model, scaling="alpha/r", alpha=3.0, rank=4)
    randomise_adapters(model)
    fastlora.save(model, tmp_path / "x.pt", format="clip-lora")
    fastlora.load(other, tmp_path / "x.pt")
    with torch.no_grad():
        for got, want in zip(features(other, *inputs(model)), features(model, *inputs(model)), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_unknown_format() -> None:
    model = tiny()
    fastlora.patch(model)
    with pytest.raises(ValueError, match="choose from fastlora, peft, clip-lora, merged"):
        fastlora.save(model, "x", format="onnx")  # type: ignore[arg-type]


def test_onto_a_patched_model(twins: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = copy.deepcopy(twins)
    peft_adapter(theirs, tmp_path, target_modules=["q_proj"], r=2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    options = {"rank": 2, "alpha": config["lora_alpha"], "targets": ("q",), "scaling": "alpha/r"}
    fastlora.patch(ours, **options, dropout=0.5, backend="eager")
    assert fastlora.load(ours, tmp_path).config.dropout == 0.5  # of training, which the patch decides
    fastlora.unpatch(ours)
    fastlora.patch(ours, rank=3)
    with pytest.raises(ValueError, match="unpatch it first"):
        fastlora.load(ours, tmp_path)


@torch.no_grad()
def test_transformers_own_model(twins: tuple[Any, Any], tmp_path: Path) -> None:
    """Patched CLIPModel -> PEFT, another CLIPModel, open_clip's model, and a merged folder for from_pretrained."""
    from peft import PeftModel

    ours, other, for_peft = (copy.deepcopy(twins[1]) for _ in range(3))
    batch = inputs(twins[0])
    plain = transformers_features(ours, *batch)
    fastlora.patch(ours, targets=ALL, rank=3)
    randomise_adapters(ours)
    want = transformers_features(ours, *batch)
    fastlora.save(ours, tmp_path / "peft", format="peft")
    there = PeftModel.from_pretrained(for_peft, str(tmp_path / "peft")).eval()
    assert_close(transformers_features(there.base_model.model, *batch), want, plain)
    fastlora.load(other, tmp_path / "peft")
    assert_close(transformers_features(other, *batch), want, plain)
    elsewhere = copy.deepcopy(twins[0])
    fastlora.load(elsewhere, tmp_path / "peft")
    assert_close(features(elsewhere, *batch), want, plain)
    fastlora.save(ours, tmp_path / "merged", format="merged")
    assert_close(transformers_features(type(ours).from_pretrained(tmp_path / "merged").eval(), *batch), want, plain)
    with pytest.raises(FileExistsError, match="not empty"):
        fastlora.save(ours, tmp_path / "merged", format="merged")


@torch.no_grad()
def test_pefts_on_transformers_own_model(twins: tuple[Any, Any], tmp_path: Path) -> None:
    ours, theirs = copy.deepcopy(twins[1]), copy.deepcopy(twins[1])
    batch = inputs(twins[0])
    plain = transformers_features(ours, *batch)
    adapted = peft_adapter(theirs, tmp_path, **PEFT_CONFIGS["uneven"])
    fastlora.load(ours, tmp_path)
    assert_close(transformers_features(ours, *batch), transformers_features(adapted.base_model.model, *batch), plain)


@torch.no_grad()
def test_a_packed_linear_in_peft(tmp_path: Path) -> None:
    """timm keeps q, k, v in one nn.Linear, for which PEFT has one A: ours are stacked, and come back the same."""
    import timm
    from peft import PeftModel

    torch.manual_seed(0)
    ours = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0).eval()
    for_peft, again = copy.deepcopy(ours), copy.deepcopy(ours)
    images = torch.randn(2, 3, 32, 32)
    plain = ours(images)
    fastlora.patch(ours, targets=("q", "v", "fc1"), rank=2, encoders="vision")
    randomise_adapters(ours)
    want = ours(images)
    fastlora.save(ours, tmp_path / "peft", format="peft")
    there = PeftModel.from_pretrained(for_peft, str(tmp_path / "peft")).eval()
    assert_close((there.base_model.model(images),), (want,), (plain,))
    fastlora.load(again, tmp_path / "peft")
    assert_close((again.eval()(images),), (want,), (plain,))
