"""LoRAConfig: the paper's positions, scaling, and one clear error for each bad value."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from fastlora import LoRAConfig


@pytest.mark.parametrize(
    ("layers", "depth", "blocks"),
    [
        ("all", 12, range(12)),
        ("half-up", 12, range(6, 12)),
        ("half-bottom", 12, range(6)),
        ("bottom", 12, range(4)),
        ("mid", 12, range(4, 8)),
        ("up", 12, range(8, 12)),
        ("top3", 12, range(9, 12)),
        ("half-up", 24, range(12, 24)),
        ("half-bottom", 24, range(12)),
        ("top3", 2, range(2)),
        ((3, 0, 3), 4, (0, 3)),
    ],
)
def test_layers_are_the_papers(layers: Any, depth: int, blocks: Any) -> None:
    assert LoRAConfig(layers=layers).layer_indices(depth) == tuple(blocks)


def test_scaling() -> None:
    assert LoRAConfig(rank=2).scale == pytest.approx(1 / math.sqrt(2))
    assert LoRAConfig(rank=4, alpha=8, scaling="alpha/r").scale == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number from 1 to 128, got 0"),
        ({"rank": 129}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"rank": 2.0}, "rank must be"),
        ({"alpha": 0}, "alpha must be a positive number"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": math.nan}, "dropout must be"),
        ({"targets": ("q", "x")}, "unknown target 'x': choose from q, k, v, o, fc1, fc2"),
        ({"targets": ()}, "target is empty"),
        ({"encoders": "audio"}, "unknown encoder 'audio': choose from vision, text"),
        ({"layers": "top"}, "unknown layers 'top'"),
        ({"layers": (-1,)}, "layers must be block indices"),
        ({"layers": ()}, "layers must be block indices"),
        ({"scaling": "alpha"}, "unknown scaling"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**options)


def test_block_beyond_the_tower() -> None:
    with pytest.raises(ValueError, match="block 12, but the tower has blocks 0 to 11"):
        LoRAConfig(layers=(12,)).layer_indices(12)


def test_order_and_repeats_do_not_matter() -> None:
    assert LoRAConfig(targets=("v", "q", "v")) == LoRAConfig(targets=("q", "v"))


def test_round_trip_through_json() -> None:
    config = LoRAConfig(rank=4, layers=(1, 2), targets=("o",), encoders=("text",))
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown LoRA option 'r'"):
        LoRAConfig.from_dict({"r": 2})


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig().rank = 3  # type: ignore[misc]


def test_rank_pattern_by_block_and_by_path() -> None:
    config = LoRAConfig(rank=2, rank_pattern={0: 0, 1: 8, "visual.*": 4})
    assert config.at("transformer.resblocks.0.attn", 0) is None
    assert [(config.at(p, i) or config).rank for p, i in (("visual.a", 1), ("visual.a", 2), ("transformer.a", 2))] == [8, 4, 2]
    own = config.at("visual.a", 2)
    assert own is not None and own.scale == pytest.approx(1 / 2)  # alpha / sqrt(4)
    assert config.unused_patterns([("visual.a", 0)]) == [1]
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("pattern", [{"a": 129}, {"a": -1}, {-1: 2}, {1.5: 2}, {"a": True}, {"a": "2"}], ids=str)
def test_bad_rank_patterns(pattern: Any) -> None:
    with pytest.raises(ValueError, match="rank_pattern maps"):
        LoRAConfig(rank_pattern=pattern)
