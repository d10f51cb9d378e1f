"""The tables of README and docs are those of the committed rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("few_shot_table", ROOT / "examples" / "few_shot_table.py")
assert SPEC is not None and SPEC.loader is not None
few_shot_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(few_shot_table)


@pytest.mark.parametrize("path", few_shot_table.PAGES, ids=lambda p: p.name)
def test_few_shot_table_is_that_of_the_rows(path: Path) -> None:
    rows = [json.loads(line) for line in few_shot_table.ROWS.read_text().splitlines()]
    assert few_shot_table.page(path, rows) == path.read_text(encoding="utf-8")


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
