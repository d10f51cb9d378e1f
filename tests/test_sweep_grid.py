"""Grids from YAML and flags: which runs they mean, and one clear line for every mistake, before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fastlora.config import LoRAConfig
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.reading import Reading
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.sweep import grid as grids
from fastlora.fewshot.sweep.grid import Run, parse, read
from fastlora.fewshot.sweep.options import OPTIONS, value_of


def yaml(tmp_path: Path, text: str) -> dict[str, Any]:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return read(path)


def test_everything_a_grid_can_say(tmp_path: Path) -> None:
    grid = parse(
        yaml(
            tmp_path,
            """
            title: two ways
            data: [a, b]
            root: [x, y]
            shots: [1, 4]
            seeds: [1, 2]
            model: mini
            crop-scale: "0.3, 1"
            iterations: {1: 10, 4: 40}
            lr: 1e-3
            variants:
              zero: {method: zero-shot}
              probe: {method: linear-probe, rank: [2, 4]}
              LoRA: {rank: [2, 4], targets: ["q,k,v", q], layers: "0,1"}
            """,
        )
    )
    assert grid.title == "two ways" and grid.roots == (Path("x"), Path("y"))
    counts = {name: sum(run.variant == name and run.data == "a" for run in grid.runs) for name in ("zero", "probe", "LoRA")}
    # zero-shot knows no shots and seeds, a probe no rank
    assert counts == {"zero": 1, "probe": 4, "LoRA": 16} and len(grid.runs) == 2 * 21
    run = grid.runs[-1]
    lora = LoRAConfig(rank=4, targets=("q",), layers=(0, 1))
    assert run.recipe == Recipe(
        model="mini", pretrained=None, crop_scale=(0.3, 1.0), lr=1e-3, iterations=40, shots=4, seed=2, lora=lora
    )
    assert run.axes == (("rank", "4"), ("targets", "q")) and run.label == "LoRA: rank 4, targets q"
    assert len({run.name for run in grid.runs}) == len(grid.runs)


def test_defaults_are_those_of_train() -> None:
    runs = parse({"data": "digits", "shots": 16, "seeds": 1}).runs
    assert [run.recipe for run in runs] == [Recipe()]


def test_every_option_of_train_is_an_option_of_a_grid() -> None:
    names = {f.name for cls in (Recipe, LoRAConfig, Reading) for f in dataclasses.fields(cls)}
    assert names - set(OPTIONS) == {"shots", "seed", "lora", "reading", "backend"}
    for cls in (Recipe, LoRAConfig):
        for field in dataclasses.fields(cls):
            if field.name in OPTIONS:
                value = getattr(cls(), field.name)
                assert value_of(field.name, value) == value, field.name


def test_flags_are_the_same_grid() -> None:
    flags = ["g.yaml", "--rank", "2,4", "--targets", "q,k,v", "--targets=q", "--template", "a {}, b", "--crop-scale", "0.3,1"]
    path, values = grids.from_flags(flags)
    assert path == Path("g.yaml")
    flagged = parse({"data": grids.listed("data", "a,b"), "shots": grids.listed("shots", "1,4"), **values})
    wanted = {"rank": [2, 4], "targets": ["q,k,v", "q"], "template": "a {}, b", "crop_scale": "0.3,1"}
    assert flagged == parse({"data": ["a", "b"], "shots": [1, 4], **wanted})


def test_a_name_changes_with_what_the_outcome_depends_on_and_nothing_else() -> None:
    run = Run("DATA/pets", Recipe(), "x")
    assert run.name.startswith("pets-lora-16shots-seed1-")
    assert dataclasses.replace(run, variant="y", axes=(("rank", "2"),)).name == run.name
    for other in (
        dataclasses.replace(run, data="OTHER/pets"),
        dataclasses.replace(run, recipe=Recipe(lr=1e-3)),
        dataclasses.replace(run, recipe=Recipe(lora=LoRAConfig(rank=4))),
    ):
        assert other.name != run.name


def test_presets() -> None:
    grid = parse(grids.preset("paper-table2"))
    assert len(grid.runs) == 99 and len({run.data for run in grid.runs}) == 11
    assert {run.recipe for run in grid.runs} == {
        Recipe(shots=shots, seed=seed, template="a photo of a {}.") for shots in (1, 4, 16) for seed in (1, 2, 3)
    }
    assert all(run.recipe.base_to_new and run.recipe.method == "lora" for run in parse(grids.preset("base-to-new")).runs)
    ablation = parse(grids.preset("paper-ablation")).runs
    assert {run.recipe.shots for run in ablation} == {4} and {run.recipe.lora.layers for run in ablation} >= {"all", "top3"}


MISTAKES = [
    ("data: [digits\nshots: 1", "line 2: expected ',' or ']'"),
    ("data: digits\nshots: 1\nshots: 2", "line 3: the key 'shots' stands there twice"),
    ("- data", "holds no mapping"),
    ("", "holds no mapping"),
    ("dta: digits", "unknown option 'dta': did you mean data?"),
    ("data: digits\nrnak: 2", "unknown option 'rnak': did you mean rank?"),
    ("data: digits\nzzz: 1", "unknown option 'zzz': known are title, data"),
    ("shots: 1", "data is missing"),
    ("data: digits\nshots: [1, x]", "shots must be whole numbers of at least 1, got 'x'"),
    ("data: digits\nshots: [0]", "shots must be whole numbers of at least 1, got 0"),
    ("data: digits\nshots: [4, 4]", "shots names 4 twice"),
    ("data: digits\nseeds: []", "seeds is empty"),
    ("data: digits\nrank: two", "rank must be a whole number, got 'two'"),
    ("data: digits\nrank: 2.5", "rank must be a whole number, got 2.5"),
    ("data: digits\nrank: 500", "rank must be a whole number from 1 to 128, got 500"),
    ("data: digits\nrank: []", "rank has no value"),
    ("data: digits\nmethod: [lora, lroa]", "unknown method 'lroa'"),
    ("data: digits\ntargets: q k z", "unknown target 'z'"),
    ("data: digits\nbetas: [0.9, 0.99]", "betas must be 2 numbers with commas, got 0.9"),
    ("data: digits\nflip: maybe", "flip must be true or false or none, got 'maybe'"),
    ("data: digits\nshots: [1, 2]\niterations: {1: 10}", "iterations has no value for 2 shots"),
    ("data: digits\nvariants: [lora]", "variants must be named sets of options"),
    ("data: digits\nvariants: {x: lora}", "variant 'x' must be a mapping of options, got 'lora'"),
    ("data: digits\nvariants: {x: {shots: 2}}", "variant 'x': unknown option 'shots'"),
]


@pytest.mark.parametrize(("text", "says"), MISTAKES, ids=[text.replace("\n", " ") or "empty" for text, _ in MISTAKES])
def test_mistakes_in_a_grid(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as told:
        parse(yaml(tmp_path, text), "grid grid.yaml")
    assert says in str(told.value) and "\n" not in str(told.value) and "grid" in str(told.value)


def test_mistakes_in_flags(tmp_path: Path) -> None:
    for flags, says in (
        (["--rnk", "2"], "unknown option --rnk: did you mean --rank?"),
        (["--rank"], "--rank needs a value"),
        (["--rank", "--lr", "1"], "--rank needs a value"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'"),
    ):
        with pytest.raises(UserError, match="^" + says.replace("?", r"\?")):
            grids.from_flags(flags)
    with pytest.raises(UserError, match="unknown preset 'paper-table': did you mean paper-table2"):
        grids.preset("paper-table")
    with pytest.raises(UserError, match="does not exist: give a YAML file, or --preset"):
        read(tmp_path / "none.yaml")
