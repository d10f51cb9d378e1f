"""The tables and pictures of README and docs are those of the committed rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops

import pages
import sweeps
from rows import read_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("path", pages.pages(), ids=lambda p: p.name)
def test_tables_are_those_of_the_rows(path: Path) -> None:
    assert pages.render(path) == path.read_text(encoding="utf-8"), "run python benchmarks/pages.py"


def test_figure_is_that_of_the_rows() -> None:
    assert pages.figure_agrees(), "run python benchmarks/pages.py"


def test_a_changed_figure_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is made anew whatever it holds; one that nothing makes is an error."""
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- probe -->\n2\n<!-- end of probe -->\nb\n")
    monkeypatch.setitem(pages.BLOCKS, "probe", lambda path: "1")
    assert pages.render(page) == "a\n<!-- probe -->\n1\n<!-- end of probe -->\nb\n"
    monkeypatch.delitem(pages.BLOCKS, "probe")
    with pytest.raises(KeyError):
        pages.render(page)


@pytest.mark.parametrize("name", sweeps.DRAWN)
def test_pictures_are_those_of_the_rows(name: str, tmp_path: Path) -> None:
    for drawn in sweeps.draw(name, tmp_path):
        with Image.open(drawn) as new, Image.open(ROOT / "docs" / drawn.name) as old:
            # another version of matplotlib sets type a little differently; other rows move whole lines and bars
            assert new.size == old.size
            gap = ImageChops.difference(new.convert("L"), old.convert("L")).histogram()
        assert sum(gap[64:]) < 0.01 * sum(gap), drawn.name
        assert f"({drawn.name})" in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_grid_was_killed_and_repeated_as_the_page_says() -> None:
    """The rows before the kill stayed; what was run once more elsewhere differs in times and memory alone."""
    results = ROOT / "benchmarks" / "results"
    whole, killed, again = (
        {row["run"]: row for row in read_rows(results / name)}
        for name in ("sweep_grid_mini.jsonl", "grid_mini_at_kill.jsonl", "grid_mini_repeated.jsonl")
    )
    assert len(whole) == 99 and killed == {run: whole[run] for run in killed}
    measured = {"seconds", "train_seconds", "steps_per_second", "memory"}
    for run, row in again.items():
        assert {key for key in row if row[key] != whole[run].get(key)} <= measured, run
    page = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    after = len(again.keys() - killed)
    assert f"with {len(killed)} runs done" in page
    assert f"{len(again)} of the runs, {after} of them made after the kill" in page


def test_mini_clips_card_has_the_figures_of_its_log() -> None:
    folder = ROOT / "fastlora" / "mini"
    rows = [json.loads(line) for line in (folder / "pretrain.jsonl").read_text().splitlines()]
    last, card = rows[-1], (folder / "README.md").read_text(encoding="utf-8")
    for figure in (
        f"{last['val_accuracy']:.1f} %",
        f"{last['step']} steps",
        f"{last['epochs']:.1f} epochs",
        f"{last['seconds'] / 60:.0f} minutes",
    ):
        assert figure in card, figure


def test_what_the_kernels_compile_to_is_that_of_the_rows() -> None:
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from fastlora.kernels import compile as compiler

    # the newest Triton, then the one of the oldest torch
    results = ROOT / "benchmarks" / "results"
    files = [read_rows(results / name) for name in ("compiled.jsonl", "compiled-triton-3.6.jsonl")]
    page = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert page.split("<!-- compiled -->\n")[1].split("\n<!-- end -->")[0] == compiler.markdown(*files)
    assert not [row for head, *found in files for row in found if row["problems"]]
    assert page.split("<!-- launches -->\n")[1].split("\n<!-- end of launches -->")[0] == compiler.launch_markdown()
