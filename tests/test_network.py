"""What a model computes besides its weights is described, compared and kept with what is trained on it."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import nn

from fastlora import mini
from fastlora.checkpoint.network import Network, activation_name
from models import tiny


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
        import json

        network = Network.of(mini.build(), open_clip.SimpleTokenizer())
        again = Network.from_dict(json.loads(json.dumps(network.to_dict())))
        assert not network.differences(again) and not again.differences(network)
        with pytest.raises(TypeError, match="is not one that fastlora wrote"):
            Network.from_dict(network.to_dict() | {"activation": 3})


class TestDifferences:
    BASE = Network({"vision": "quick_gelu"}, {"size": 224, "mean": [0.5, 0.5, 0.5], "resize_mode": "squash"}, 77, "abc")

    def test_only_what_both_know_is_compared(self) -> None:
        assert not self.BASE.differences(Network()) and not Network().differences(self.BASE)

    @pytest.mark.parametrize(
        "other, told, options",
        [
            (Network({"vision": "gelu"}), "activation of vision quick_gelu, here gelu", {"force_quick_gelu": True}),
            (Network({}, {"size": 336}), "size 224, here 336", {"force_image_size": 224}),
            (Network({}, {"mean": [0.4, 0.5, 0.5]}), "mean [0.5, 0.5, 0.5], here [0.4, 0.5, 0.5]", {"image_mean": (0.5,) * 3}),
            (Network({}, {"resize_mode": "shortest"}), "resize_mode squash, here shortest", {"image_resize_mode": "squash"}),
            (Network({}, {}, 64), "context length 77, here 64", {"force_context_length": 77}),
            (Network(tokenizer="abd"), "tokenizer abc, here abd", {}),
        ],
    )
    def test_each_is_told_with_the_argument_that_mends_it(self, other: Network, told: str, options: dict[str, Any]) -> None:
        assert self.BASE.told(other) == told
        assert self.BASE.options_over(other) == options

    def test_gelu_over_quick_gelu(self) -> None:
        assert Network({"vision": "gelu"}).options_over(Network({"vision": "quick_gelu"})) == {"quick_gelu": False}
