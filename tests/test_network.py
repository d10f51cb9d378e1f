"""What a model computes besides its weights is described, compared and kept with what is trained on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora import mini
from fastlora.checkpoint.network import Network, activation_name
from models import randomise_adapters, tiny


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


class TestActivation:
    @pytest.mark.parametrize(
        "module, name",
        [
            (nn.GELU(), "gelu"),
            (nn.GELU(approximate="tanh"), "gelu_tanh"),
            (open_clip.transformer.QuickGELU(), "quick_gelu"),
            (nn.ReLU(), "relu"),
            (nn.SiLU(), "silu"),
            (Odd(), "Odd"),
            (nn.GLU(), "GLU"),
        ],
    )
    def test_is_named_by_what_it_computes(self, module: nn.Module, name: str) -> None:
        assert activation_name(module) == name

    def test_of_transformers(self) -> None:
        from transformers.activations import ACT2FN

        named = {name: activation_name(ACT2FN[name]) for name in ("gelu", "quick_gelu", "gelu_pytorch_tanh", "gelu_new")}
        assert named == {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}

    def test_replaced_in_place_is_seen(self) -> None:
        """Another forward of the same class is another function."""
        model = tiny()
        for block in model.visual.transformer.resblocks:
            block.mlp.gelu.forward = lambda x: x * torch.sigmoid(1.702 * x)
        assert Network.of(model).activation == {"text": "gelu", "vision": "quick_gelu"}


class TestOf:
    def test_open_clip(self) -> None:
        network = Network.of(mini.build(), open_clip.SimpleTokenizer())
        assert network.preprocessing["size"] == 64 and network.preprocessing["resize_mode"] == "shortest"
        assert network.activation == {"text": "gelu", "vision": "gelu"} and network.context_length == 77
        assert network.tokenizer == Network.of(mini.build(), open_clip.SimpleTokenizer()).tokenizer
        assert network.tokenizer != Network.of(mini.build(), open_clip.SimpleTokenizer(clean="canonicalize")).tokenizer

    def test_transformers_and_timm(self) -> None:
        import timm
        from transformers import CLIPConfig, CLIPModel

        small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        clip = Network.of(
            CLIPModel(CLIPConfig(text_config=small, vision_config=small | {"image_size": 64, "hidden_act": "gelu"}))
        )
        assert clip.activation == {"text": "quick_gelu", "vision": "gelu"}
        assert (clip.preprocessing, clip.context_length) == ({"size": 64}, 77)
        vit = Network.of(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64))
        assert vit.activation == {"blocks": "gelu"} and vit.preprocessing["size"] == 64 and vit.context_length is None

    def test_a_dictionary_and_back(self) -> None:
        network = Network.of(mini.build(), open_clip.SimpleTokenizer())
        again = Network.from_dict(json.loads(json.dumps(network.to_dict())))
        assert not network.differences(again) and not again.differences(network)
        with pytest.raises(TypeError, match="is not one that fastlora wrote"):
            Network.from_dict(network.to_dict() | {"activation": 3})


class TestDifferences:
    BASE = Network(
        {"vision": "quick_gelu"}, {"vision": "12"}, {"size": 224, "mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}, 77, "abc"
    )

    def test_only_what_both_know_is_compared(self) -> None:
        assert not self.BASE.differences(Network()) and not Network().differences(self.BASE)

    @pytest.mark.parametrize(
        "other, told, options",
        [
            (Network({"vision": "gelu"}), "activation of vision quick_gelu, here gelu", {"force_quick_gelu": True}),
            (Network({}, {"vision": "8"}), "heads of vision 12, here 8", {}),
            (Network({}, {}, {"size": 336}), "size 224, here 336", {"force_image_size": 224}),
            (
                Network({}, {}, {"mean": [0.4, 0.5, 0.5]}),
                "mean [0.5, 0.5, 0.5], here [0.4, 0.5, 0.5]",
                {"image_mean": (0.5,) * 3},
            ),
            (
                Network({}, {}, {"resize_mode": "shortest"}),
                "resize_mode squash, here shortest",
                {"image_resize_mode": "squash"},
            ),
            (Network({}, {}, {}, 64), "context length 77, here 64", {"force_context_length": 77}),
            (Network(tokenizer="abd"), "tokenizer abc, here abd", {}),
        ],
    )
    def test_each_is_told_with_the_argument_that_mends_it(self, other: Network, told: str, options: dict[str, Any]) -> None:
        assert self.BASE.told(other) == told
        assert self.BASE.options_over(other) == options

    def test_gelu_over_quick_gelu(self) -> None:
        assert Network({"vision": "gelu"}).options_over(Network({"vision": "quick_gelu"})) == {"quick_gelu": False}


@pytest.fixture
def quick() -> Any:
    """A model with QuickGELU whose adapter is trained."""
    model = tiny(quick_gelu=True)
    fastlora.patch(model)
    randomise_adapters(model)
    return model


def state(model: nn.Module) -> tuple[list[int], list[bool], list[torch.Tensor]]:
    """The model's modules, flags and values."""
    parameters = list(model.parameters())
    return [id(m) for m in model.modules()], [p.requires_grad for p in parameters], [p.detach().clone() for p in parameters]


class TestAnAdapter:
    NAMES: ClassVar = {"fastlora": "a.safetensors", "peft": "peft", "clip-lora": "a.pt"}

    @pytest.mark.parametrize("format", NAMES)
    def test_is_refused_by_another_network(self, quick: Any, tmp_path: Path, format: Any) -> None:
        path = tmp_path / self.NAMES[format]
        fastlora.save(quick, path, format=format)
        fastlora.load(tiny(quick_gelu=True), path)
        other = tiny()
        before = state(other)
        right = r"create_model_and_transforms\(\.\.\., force_quick_gelu=True\)"
        with pytest.raises(ValueError, match=f"activation of text quick_gelu, here gelu.*{right}, or pass check_base=False"):
            fastlora.load(other, path)
        after = state(other)
        assert before[:2] == after[:2] and all(map(torch.equal, before[2], after[2]))
        fastlora.load(other, path, check_base=False)

    @pytest.mark.parametrize(
        "changes, told",
        [
            ({"vision_cfg": {"image_size": 64}}, "size 32, here 64; build it with .*force_image_size=32"),
            ({"text_cfg": {"context_length": 24}}, "context length 16, here 24; build it with .*force_context_length=16"),
        ],
    )
    def test_is_refused_by_other_inputs(self, quick: Any, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
        fastlora.save(quick, tmp_path / "a.safetensors")
        other = tiny(quick_gelu=True, **changes)
        other.load_state_dict({k: v for k, v in tiny().state_dict().items() if "positional" not in k}, strict=False)
        with pytest.raises(ValueError, match=told):
            fastlora.load(other, tmp_path / "a.safetensors")

    @pytest.mark.parametrize(
        "name, value, told",
        [
            ("mean", (0.5, 0.5, 0.5), r"image_mean=\(0.48145466"),
            ("resize_mode", "squash", "image_resize_mode='shortest'"),
            ("interpolation", "bilinear", "image_interpolation='bicubic'"),
        ],
    )
    def test_is_refused_behind_other_preprocessing(self, tmp_path: Path, name: str, value: Any, told: str) -> None:
        model = mini.build()
        fastlora.patch(model)
        fastlora.save(model, tmp_path / "a.safetensors")
        other = mini.build()
        other.load_state_dict(model.state_dict(), strict=False)
        other.visual.preprocess_cfg[name] = value
        with pytest.raises(ValueError, match=told):
            fastlora.load(other, tmp_path / "a.safetensors")

    def test_is_refused_by_other_heads(self, quick: Any, tmp_path: Path) -> None:
        """The weights have the same shapes, whatever the number of heads."""
        fastlora.save(quick, tmp_path / "a.safetensors")
        other = tiny(quick_gelu=True, vision_cfg={"head_width": 16})
        with pytest.raises(ValueError, match="heads of vision 2, here 4; give it the model that it was trained on"):
            fastlora.load(other, tmp_path / "a.safetensors")

    def test_is_compared_through_the_wrapper_of_compile(self, quick: Any, tmp_path: Path) -> None:
        fastlora.save(torch.compile(quick), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="activation of text quick_gelu, here gelu"):
            fastlora.load(tiny(), tmp_path / "a.safetensors")
        assert Network.of(torch.compile(tiny())) == Network.of(tiny())

    def test_knows_its_tokenizer_where_it_is_given(self, quick: Any, tmp_path: Path) -> None:
        ours, theirs = open_clip.SimpleTokenizer(), open_clip.SimpleTokenizer(clean="canonicalize")
        fastlora.save(quick, tmp_path / "a.safetensors", tokenizer=ours)
        fastlora.load(tiny(quick_gelu=True), tmp_path / "a.safetensors")
        fastlora.load(tiny(quick_gelu=True), tmp_path / "a.safetensors", tokenizer=ours)
        with pytest.raises(ValueError, match="was trained on another network: tokenizer"):
            fastlora.load(tiny(quick_gelu=True), tmp_path / "a.safetensors", tokenizer=theirs)

    def test_of_one_host_is_refused_on_another_with_another_activation(self, tmp_path: Path) -> None:
        """PEFT's folder goes from open_clip to transformers, whose parts of a model have other names."""
        from transformers import CLIPConfig, CLIPModel

        from fastlora.checkpoint import clip_folder

        model, tokenizer = tiny(quick_gelu=True, text_cfg={"vocab_size": 49408}), open_clip.SimpleTokenizer(context_length=16)
        plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        network = dataclasses.replace(
            Network.of(model), preprocessing=Network.of(mini.build()).preprocessing | {"size": 32}, context_length=16
        )
        clip_folder.write_transformers(tmp_path, model, plain, network, tokenizer)
        fastlora.patch(model)
        fastlora.save(model, tmp_path / "peft", format="peft")
        fastlora.load(CLIPModel.from_pretrained(tmp_path), tmp_path / "peft")
        config = CLIPConfig.from_pretrained(tmp_path)
        config.vision_config.hidden_act = "gelu"
        with pytest.raises(ValueError, match="activation of vision quick_gelu, here gelu"):
            fastlora.load(CLIPModel(config), tmp_path / "peft")

    def test_of_an_earlier_version_is_taken_with_one_warning(self, quick: Any, tmp_path: Path) -> None:
        path = tmp_path / "old.safetensors"
        fastlora.save(quick, path)
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["fastlora"])
        del values["network"]
        save_file(load_file(path), path, {"fastlora": json.dumps(values)})
        model = tiny(quick_gelu=True)
        with pytest.warns(
            UserWarning, match=r"an earlier version.*activation of text quick_gelu.*fastlora\.save\(model, "
        ) as said:
            fastlora.load(model, path)
        assert len(said) == 1
        fastlora.save(model, path)
        fastlora.load(tiny(quick_gelu=True), path)  # a warning would be an error here
