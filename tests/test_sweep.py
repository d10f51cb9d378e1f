"""Sweeps with a tiny CLIP: each run once, whatever stops it; rows, tables; a run that fails does not end the night."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from fastlora.fewshot.errors import Interrupted, UserError
from fastlora.fewshot.lock import Busy
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.shared import Shared
from fastlora.fewshot.sweep import render, results, runner, tables
from fastlora.fewshot.sweep.execute import BUSY, Place, execute
from fastlora.fewshot.sweep.grid import Grid, parse
from owning import elsewhere
from pictures import make_folder, pausing
from waiting import wait

QUIET = Console(quiet=True)
VOLATILE = ("seconds", "train_seconds", "steps_per_second", "memory", "date")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "pictures", ["red", "green", "blue"], images=6)


def values(model: str, folder: Path, **more: Any) -> dict[str, Any]:
    small = {"model": model, "pretrained": "none", "iterations": 4, "batch_size": 4, "lr": 1e-2}
    variants = {"LoRA": {"rank": [1, 2]}, "probe": {"method": "linear-probe"}, "zero": {"method": "zero-shot"}}
    return {"data": str(folder), "shots": [1, 2], "seeds": [1, 2], **small, "variants": variants, **more}


def steady(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from one run to the next of the same thing."""
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in rows]


@pytest.fixture(scope="module")
def grid(model: str, folder: Path) -> Grid:
    return parse(values(model, folder))


@pytest.fixture(scope="module")
def undisturbed(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, runner.sweep(grid, Place(out, grid.roots, "cpu"), QUIET)


def test_rows(grid: Grid, undisturbed: tuple[Path, list[dict[str, Any]]]) -> None:
    out, rows = undisturbed
    assert len(rows) == len(grid.runs) == 8 + 4 + 1
    assert [row["run"] for row in rows] == [run.name for run in grid.runs]
    for row in rows:
        metrics = json.loads((out / row["run"] / "metrics.json").read_text())
        assert (row["accuracy"], row["test_images"]) == (metrics["accuracy"], metrics["test_images"])
        assert row["seconds"] >= 0 and row["generated"] is False
        assert row["method"] != "lora" or (row["rank"] == int(row["axes"]["rank"]) and row["steps"] == 4)
    assert results.read_rows(out / "rows.jsonl") == rows
    with open(out / "rows.csv", newline="", encoding="utf-8") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in rows]


def test_parquet_has_the_rows(undisturbed: tuple[Path, list[dict[str, Any]]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="without pyarrow a sweep writes CSV and JSON lines only")
    out, rows = undisturbed
    table = parquet.read_table(out / "rows.parquet").to_pylist()
    assert [(row["run"], row["accuracy"], row["shots"]) for row in table] == [
        (row["run"], row["accuracy"], row["shots"]) for row in rows
    ]


def test_what_is_done_is_not_done_again_and_a_grid_may_grow(
    model: str, folder: Path, undisturbed: tuple[Path, list[dict[str, Any]]]
) -> None:
    out, rows = undisturbed
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.json")}
    larger = parse(values(model, folder, seeds=[1, 2, 3], variants={"probe": {"method": "linear-probe"}}))
    grown = runner.sweep(larger, Place(out, larger.roots, "cpu"), QUIET)
    assert len(grown) == 6 and [row for row in grown if row["seed"] < 3] == [r for r in rows if r["method"] == "linear-probe"]
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


def test_stopped_by_a_signal_it_goes_on_to_the_same_rows(
    grid: Grid, tmp_path: Path, undisturbed: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "out", grid.roots, "cpu", again="the same command")
    train_step, steps = Loop.train_step, []

    def step(loop: Loop) -> None:
        train_step(loop)
        steps.append(loop.step)
        if len(steps) == 6:  # in the middle of the second run
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Loop, "train_step", step)
    with pytest.raises(Interrupted, match="go on with: the same command"):
        runner.sweep(grid, place, QUIET)
    assert len(results.read_rows(place.out / "rows.jsonl")) == 1
    assert steady(runner.sweep(grid, place, QUIET)) == steady(undisturbed[1])
    assert len(steps) == 8 * 4  # no step was taken twice


def test_killed_in_the_middle_it_goes_on_to_the_same_rows(
    grid: Grid, model: str, folder: Path, tmp_path: Path, undisturbed: tuple[Path, list[dict[str, Any]]]
) -> None:
    out = tmp_path / "out"
    grid_file = tmp_path / "grid.yaml"
    grid_file.write_text(json.dumps(values(model, folder)))  # JSON is YAML
    mark = tmp_path / "paused"
    arguments = pausing(14, mark, "sweep", str(grid_file), "--out", str(out), "--device", "cpu")  # in the fourth run
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=tmp_path
    ) as process:
        wait(lambda: mark.exists() or process.poll() is not None)
        process.kill()
        said = process.communicate()[0]
    done = len(list(out.glob("*/metrics.json")))
    assert process.returncode == -signal.SIGKILL and 3 <= done < len(grid.runs), said
    assert steady(runner.sweep(grid, Place(out, grid.roots, "cpu"), QUIET)) == steady(undisturbed[1])


def test_a_run_that_fails_does_not_end_the_sweep(model: str, folder: Path, tmp_path: Path) -> None:
    grid = parse(values(model, folder, lr=[1e30, 1e-2], shots=2, seeds=1, variants={"LoRA": {}}))
    place = Place(tmp_path / "out", grid.roots, "cpu")
    with pytest.raises(UserError, match=r"1 of 2 runs failed, the first is .*: the loss is not a number"):
        runner.sweep(grid, place, QUIET)
    assert [row["lr"] for row in results.read_rows(place.out / "rows.jsonl")] == [1e-2]
    with pytest.raises(UserError, match="1 of 2 runs failed"):  # tried again, fails again
        runner.sweep(grid, place, QUIET)


def test_two_sweeps_in_one_folder(grid: Grid, tmp_path: Path) -> None:
    place = Place(tmp_path, grid.roots, "cpu")
    with elsewhere(tmp_path), pytest.raises(Busy, match=r"another process is at work in .*: process \d+ on .* since "):
        runner.sweep(grid, place, QUIET)
    run = grid.runs[0]
    with elsewhere(tmp_path / run.name):
        assert execute(run, place, Shared()) == BUSY
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["index.html", "rows.csv", "rows.jsonl", "shots.png", "options-3.png"])
def test_files_of_the_users_are_not_overwritten(grid: Grid, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")  # a run of another name makes no sweep
    with pytest.raises(UserError, match=rf"holds {name}, but no run of a sweep"):
        runner.sweep(grid, Place(tmp_path, grid.roots, "cpu"), QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])
    assert (tmp_path / name).read_text() == "mine"


def test_a_sweep_that_got_nowhere_can_be_tried_again(model: str, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "broken", ["a", "b"], images=3)
    for path in data.rglob("*.png"):
        path.write_text("no picture")
    grid = parse(values(model, data, shots=1, seeds=1, variants={"LoRA": {}}))
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 of 1 runs failed, .* has no readable training image"):
            runner.sweep(grid, Place(tmp_path / "out", grid.roots, "cpu"), QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": "nowhere"}, "DATA nowhere does not exist"),
        ({"model": "ViT-B-61", "pretrained": "openai"}, "unknown model 'ViT-B-61': did you mean ViT-B-16"),
        ({"layers": "0,7"}, "layers names block 7"),
        ({"rank": [2, 65]}, "rank 65 is above the width"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
    ],
    ids=str,
)
def test_mistakes_that_need_a_look_at_data_or_model(
    model: str, folder: Path, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    grid = parse({**values(model, folder, variants={"LoRA": {}}), **changes})
    with pytest.raises(UserError, match=says):
        runner.sweep(grid, Place(tmp_path / "out", grid.roots, "cpu"), QUIET)
    assert not (tmp_path / "out").exists()


def test_known_sets_are_looked_for_in_every_root(model: str, folder: Path, tmp_path: Path) -> None:
    rows = [[f"red/{i}.png", 0, "red"] for i in range(6)] + [[f"blue/{i}.png", 1, "blue"] for i in range(6)]
    place = tmp_path / "second" / "caltech-101"
    place.mkdir(parents=True)
    (place / "101_ObjectCategories").symlink_to(folder, target_is_directory=True)
    split = {"train": rows[::2], "val": [], "test": rows[1::2]}
    (place / "split_zhou_Caltech101.json").write_text(json.dumps(split))
    grid = parse(values(model, folder, data="caltech101", root=[str(tmp_path / "first"), str(tmp_path / "second")],
                        shots=1, seeds=1, variants={"LoRA": {}}))  # fmt: skip
    (row,) = runner.sweep(grid, Place(tmp_path / "out", grid.roots, "cpu"), QUIET)
    assert row["test_images"] == 6


def test_tables_are_means_over_seeds_beside_the_papers(undisturbed: tuple[Path, list[dict[str, Any]]]) -> None:
    _, rows = undisturbed
    plain, ablation = tables.tables(rows)
    probe = [row["accuracy"] for row in rows if row["method"] == "linear-probe" and row["shots"] == 2]
    line = next(row for row in plain.rows if row[1] == "probe")
    assert line[3] == tables.cell(probe, 2) == f"{sum(probe) / 2:.1f} ± {abs(probe[0] - probe[1]) / 2**0.5:.1f}"
    assert [row[0] for row in ablation.rows] == ["1", "2"] and ablation.heads[0] == "rank"
    assert tables.cell([50.0], 3) == "50.0 (1 of 3 seeds)" and tables.cell([], 3) == "not run"
    assert tables.paper()[16]["caltech101"] == 96.4 and tables.paper("ViT-L/14")[1]["eurosat"] == 73.7
    known = tables.by_shots([row | {"data": "caltech101"} for row in rows])
    assert known.rows[-1] == ("caltech101", "the paper, ViT-B-16", "93.7", "94.6")


def test_a_run_in_two_variants_is_carried_out_once(model: str, folder: Path, tmp_path: Path) -> None:
    variants = {"rank": {"rank": [1, 2]}, "layers": {"layers": ["all", "0"], "rank": 2}}
    grid = parse(values(model, folder, shots=1, seeds=1, variants=variants))
    rows = runner.sweep(grid, Place(tmp_path / "out", grid.roots, "cpu"), QUIET)
    assert [(row["variant"], *row["axes"].values()) for row in rows] == [
        ("rank", "1"), ("rank", "2"), ("layers", "all"), ("layers", "0"),
    ]  # fmt: skip
    assert rows[1]["run"] == rows[2]["run"] and len(list((tmp_path / "out").glob("*/metrics.json"))) == 3
    assert rows == runner.finished(grid, Place(tmp_path / "out", grid.roots, "cpu"))


def test_page_and_figures(undisturbed: tuple[Path, list[dict[str, Any]]], tmp_path: Path, capsys: Any) -> None:
    rows = [
        row | {"data": data, "run": data + row["run"], "generated": data == "dtd"}
        for data in ("dtd", "eurosat", "<pets>")
        for row in undisturbed[1]
    ]
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        render.render(rows, "A & B", out, Console(width=200))
    page = (tmp_path / "a" / "index.html").read_text(encoding="utf-8")
    for piece in (
        "A &amp; B",
        "dtd (generated)",
        "&lt;pets&gt;",
        "the paper, ViT-B-16",
        "72.3",
        "arXiv 2405.18541",
        "39 runs",
    ):
        assert piece in page, piece
    assert "no measure of anything but the machinery: dtd" in page and "<pets>" not in page and "http://" not in page
    said = capsys.readouterr().out
    assert "dtd (generated)" in said and "zero-shot" in said
    pictures = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert pictures == ["options-1.png", "shots.png"] and page.count("data:image/png") == 2
    for name in pictures:
        with Image.open(tmp_path / "a" / name) as picture:
            assert picture.width > 800 and len(set(picture.convert("L").tobytes())) > 50  # something is drawn
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
