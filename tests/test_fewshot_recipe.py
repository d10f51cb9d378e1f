"""The recipe: the paper's values by default, everything checked, nothing lost on its way to config.json and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastlora.config import LoRAConfig
from fastlora.fewshot.recipe import Recipe


def test_defaults_are_the_papers() -> None:
    recipe = Recipe()
    assert (recipe.steps, recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (8000, 32, 2e-4, 1e-2)
    assert (recipe.betas, recipe.lr_min, recipe.crop_scale) == ((0.9, 0.999), 1e-6, (0.08, 1.0))
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.targets) == (2, 1.0, 0.25, ("q", "k", "v"))
    assert Recipe(shots=1).steps == 500


def test_learning_rate_follows_a_cosine_at_every_step() -> None:
    recipe = Recipe(iterations=100, lr=1e-3, lr_min=1e-5)
    assert recipe.lr_at(0) == pytest.approx(1e-3)
    assert recipe.lr_at(50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert recipe.lr_at(100) == pytest.approx(1e-5)


def test_schedule_is_torchs_cosine() -> None:
    import torch

    recipe = Recipe(iterations=20)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, eta_min=recipe.lr_min)
    for step in range(20):
        assert recipe.lr_at(step) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


def test_full_fine_tuning_has_its_own_rate() -> None:
    assert Recipe(method="full").learning_rate == 1e-5
    assert Recipe(method="full", lr=3e-5).learning_rate == 3e-5


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("shots", 0, "at least 1"),
        ("shots", True, "whole number"),
        ("iterations", 0, "at least 1"),
        ("batch_size", -1, "at least 1"),
        ("lr", 0.0, "positive"),
        ("lr", float("nan"), "positive"),
        ("lr", 1e-9, "at least lr_min"),
        ("method", "lore", "lora, full"),
        ("precision", "fp8", "fp32"),
        ("template", "a photo", "{}"),
        ("template", "{} and {}", "{}"),
        ("template", "{name} {}", "{}"),
        ("template", ("a {}.", "no braces"), "{}"),
        ("template", ("a {}.", "a {}."), "given twice"),
        ("template", (), "empty"),
        ("kl_weight", -0.1, "0 or more"),
        ("kl_temperature", 0.0, "kl_temperature must be a positive number"),
        ("lr_ratio", float("inf"), "lr_ratio must be a positive number"),
        ("average", 1.0, r"\[0, 1\)"),
        ("crop_scale", (0.5, 0.1), "rising"),
        ("betas", (0.9, 1.0), "betas"),
        ("seed", -1, "at least 0"),
    ],
)
def test_bad_values_are_named(option: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe(**{option: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "full", "lr_ratio": 4.0}, "lr_ratio is of lora_B over lora_A, which method full does not have"),
        ({"method": "linear-probe", "average": 0.5}, "average needs a method with training steps, linear-probe has none"),
        ({"method": "zero-shot", "kl_weight": 0.1}, "kl_weight needs a method with training steps, zero-shot has none"),
    ],
)
def test_options_that_a_method_does_not_have(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Recipe(**options)


def test_one_template_in_a_list_is_that_template() -> None:
    assert Recipe(template=("a {}.",)) == Recipe(template="a {}.")
    several = Recipe(template=("a {}.", "the {}."))
    assert Recipe.from_dict(json.loads(json.dumps(several.to_dict()))) == several


def test_json_and_back() -> None:
    recipe = Recipe(shots=4, lora=LoRAConfig(rank=8, layers=(0, 3)), template="{} texture.", flip=False)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown recipe option 'shot'"):
        Recipe.from_dict({"shot": 1})
