"""Rows to tables, pictures and a page; what is not a row is refused in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastlora.bench import plots, tables
from fastlora.bench.page import page, save
from fastlora.bench.rows import MODEL, fit, over, pick, read, shares, spread
from fastlora.bench.targets import targets
from fastlora.cli import app
from fastlora.fewshot.errors import UserError

ENV = {"row": "run", "date": "2026-01-02T03:04:05", "commit": "abc", "cpu": "a CPU", "cores": 2, "threads": 2, "device": "cpu"}
LIMITS = {"row": "ceilings", "flops": 1e11, "bandwidth": 1e10}
TIMES = {"frozen": 4000.0, "fastlora": 2000.0, "fastlora, share_prefix": 1500.0, "textbook": 6000.0}


def step(name: str, classes: int, ms: float, run: int, method: str = "clock") -> dict[str, Any]:
    case = f"{MODEL} batch 32 classes {classes} r=2 p=0.25"
    job = {"case": case, "model": MODEL, "classes": classes, "batch": 32, "rank": 2, "dropout": 0.25}
    times = {"phase": "step", "method": method, "median_ms": ms, "over_frozen": ms / 4000.0}
    counted = {"flops": ms / 1e3 * 0.5e11} if run == 2 else {}  # half of the GEMM speed; in one run alone, as the same in all
    return {"row": "step", **job, "contestant": name, **times, **counted, "saved_bytes": 2**30, "run": run}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs in which the paper's arithmetic takes 4.0, 4.4 and 5.0 times as long as ours, and every other kind of row."""
    out = tmp_path_factory.mktemp("rows")
    for run, factor in ((1, 4.0), (2, 4.4), (3, 5.0)):
        rows = [step(name, 100, ms, run) for name, ms in TIMES.items()]
        rows += [step("the paper's arithmetic", 100, 2000.0 * factor, run), step("fastlora", 1000, 9000.0, run)]
        rows += [step("the paper's arithmetic", 1000, 90000.0, run, "chunks")]
        for size in (10, 100, 1000):
            common = {"row": "scaling", "axis": "classes", "size": size, "run": run}
            rows += [common | {"contestant": "textbook", "median_ms": 5.0 * size**0.5}]
        rows += [
            {
                "row": "memory",
                "case": "m",
                "model": MODEL,
                "classes": 100,
                "batch": 32,
                "contestant": name,
                "run": run,
            }
            | {"peak_bytes": peak, "growth_bytes": peak / 2}
            for name, peak in (("fastlora", 2 * 2**30), ("the paper's arithmetic", 8 * 2**30))
        ]
        rows += [
            {
                "row": "memory",
                "case": f"{n}",
                "model": MODEL,
                "classes": n,
                "batch": 32,
                "contestant": name,
                "run": run,
            }
            | {"peak_bytes": 2**30 * (1 + n / 100 * 7), "growth_bytes": 2**30}
            for n, name in ((10, "the paper's arithmetic"), (1000, "fastlora"))
        ]
        for where, seconds in (("inside", 1.0), ("outside", 1.2)):
            rows.append({"row": "agreement", "contestant": "PEFT", "where": where, "seconds": seconds, "run": run})
        for phase in ("forward", "backward", "both"):
            for name, ms in (("frozen", 1.0), ("fastlora eager", 1.25)):
                timed = {"phase": phase, "median_ms": ms, "over_frozen": ms, "method": "clock", "share_of_roofline": 0.8}
                rows.append({"row": "op", "case": "qkv", "contestant": name, **timed, "saved_bytes": 100, "run": run})
        text = "".join(json.dumps(row) + "\n" for row in (ENV, LIMITS, *rows))
        (out / f"run{run}.jsonl").write_text(text)
    return out


def test_what_has_no_time_is_told_apart_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    untimed = [
        {"row": "op", "case": "qkv", "contestant": "PEFT", "refused": ["da: got 2, allowed 1", "db: got 3"]},
        {"row": "step", "case": "mini", "contestant": "textbook", "engine": "graph", "failed": "RuntimeError()"},
        {"row": "gemm", "product": "x Wᵀ", "contestant": "triton", "skipped": "no Triton"},
    ]
    file.write_text("\n".join(map(json.dumps, [ENV, LIMITS, step("fastlora", 10, 2000.0, 1), *untimed])))
    made = {table.title.split(":")[0]: table for table in tables.everything(read(file))}
    assert [cells[0] for cells in made["One training step"].cells] == ["fastlora"]
    assert "da: got 2, allowed 1; db: got 3" in made["Not timed"].markdown()
    assert len(made["Not timed"].cells) == 3


def test_tables_say_what_the_rows_say(folder: Path) -> None:
    rows = read(folder)
    table = tables.steps([row for row in rows if row.get("classes") == 100], one=True)
    assert table is not None
    cells = {row[0]: row[1:] for row in table.cells}
    assert cells["the paper's arithmetic"] == ("8.80 s", "2.20 ± 14 %", "4.40 ± 14 %", "50 %", "1.00 GiB")
    assert cells["fastlora"][2] == "1.00" and cells["textbook"][2] == "3.00"
    memory = tables.memory(rows)
    assert memory is not None and memory.cells[1] == ("m", "the paper's arithmetic", "8.00 GiB", "4.00 GiB", "0.25")
    assert next(c[:3] for c in memory.cells if "ᵉ" in c[1]) == ("1000", "the paper's arithmetic ᵉ", "71.00 GiB")
    agreement = tables.agreement(rows)
    assert agreement is not None and agreement.cells == [("PEFT", "1.00 s", "1.20 s", "0.83", "differ by more than 10 %")]
    scaling = tables.scaling(rows)
    assert scaling is not None and scaling.cells[0][-2:] == ("0.50", "0.50")


def test_targets_say_met_missed_or_not_measured(folder: Path) -> None:
    found = {row[0]: row[1:] for row in targets(read(folder)).cells}  # type: ignore[union-attr]
    faster = "ViT-B-32, {} classes: faster than the paper's arithmetic"
    assert found[faster.format(100)] == ("≥ 4.2 ×", "4.4 ×", "4.00 to 5.00", "met")
    assert found[faster.format(1000)][-1] == "missed" and found[faster.format(10)][-1] == "not measured"
    assert found["100 classes: peak memory over the paper's arithmetic"][-1] == "met"
    assert found["ViT-B-32, 100 classes: share of torch.mm's own speed"][-1] == "missed"


def test_ratios_have_both_sides_from_one_run(folder: Path) -> None:
    """One run whose machine was half as fast changes no ratio."""
    rows = read(folder)
    slow = [row | {"median_ms": 2 * row["median_ms"]} if row.get("run") == 2 and "median_ms" in row else row for row in rows]
    before, after = (over(pick(part, row="step", classes=100), "textbook", "fastlora") for part in (rows, slow))
    assert before == after == [3.0] * 3


def test_command_writes_a_page_and_pictures(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "page"
    done = CliRunner().invoke(app, ["bench", str(folder), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "One training step: ViT-B-32" in done.output and "4.40 ± 14 %" in done.output
    assert {path.name for path in out.iterdir()} == {"page.html", *(f"{name}.png" for name in plots.PLOTS)}
    text = (out / "page.html").read_text()
    assert text.count("<svg") == len(plots.PLOTS) and "http-equiv" not in text and "<script" not in text
    assert page(read(folder), "x") == page(read(folder), "x")


@pytest.mark.parametrize("name", ["page.html", f"{next(iter(plots.PLOTS))}.png"])
def test_a_page_replaces_a_page_and_nothing_else(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("fastlora.bench.page.figures", lambda _: {})  # no time for pictures
    (tmp_path / name).write_text("<title>mine</title>")
    with pytest.raises(UserError, match=rf"holds {re.escape(name)}, but no page of fastlora bench"):
        save(read(folder), tmp_path, "x")
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "<title>mine</title>"
    (tmp_path / name).unlink()
    for title in ("first", "second"):
        save(read(folder), tmp_path, title)
    assert "second" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("", "holds no row"),
        ("{}\n[1]\n", "line 2 is not a JSON object"),
        ("no json\n", "line 1 is not"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, ["bench", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError) and says in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_of_a_single_run_the_spread_is_that_of_its_steps(tmp_path: Path) -> None:
    """Each step over the one beside it: 3.0 and 4.0; a process that gives memory back over one that keeps it: 2.0 and 2.2."""
    file = tmp_path / "rows.jsonl"
    rows = [step("fastlora", 100, 2000.0, 1) | {"all_ms": [1000.0, 3000.0]}]
    rows += [step("PEFT", 100, 7500.0, 1) | {"all_ms": [3000.0, 12000.0]}]
    job = {"row": "allocator", "contestant": "fastlora", "run": 1}
    rows += [job | {"keeps_freed": True, "median_ms": 10.0, "all_ms": [10.0, 10.0], "page_faults": [0, 2]}]
    rows += [job | {"keeps_freed": False, "median_ms": 21.0, "all_ms": [20.0, 22.0], "page_faults": [5000, 7000]}]
    file.write_text("\n".join(map(json.dumps, [ENV, LIMITS, *rows])))
    made = {table.title.split(":")[0]: table for table in tables.everything(read(file))}
    table = made["One training step"]  # without a floor, and so without the column over it
    assert table.heads[2] == "over fastlora" and [cells[2] for cells in table.cells] == ["1.00", "3.50 ± 14 %"]
    assert [cells[2:] for cells in made["Kept memory"].cells] == [("10 ms", "1.00", "1"), ("21 ms", "2.10 ± 5 %", "6,000")]


def test_one_noisy_second_makes_no_share(tmp_path: Path) -> None:
    """Three processes, of which one measured half of the machine's GEMM speed: its step counts like the others."""
    for run, flops in ((1, 1e11), (2, 1e11), (3, 0.5e11)):
        lines = [ENV, LIMITS | {"flops": flops}, step("fastlora", 10, 2000.0, run) | {"flops": 1e11}]
        (tmp_path / f"run{run}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert shares(read(tmp_path), "fastlora") == [0.5, 0.5, 0.5]


def test_fit_finds_the_exponent() -> None:
    factor, exponent = fit([(x, 3.0 * x**1.5) for x in (1.0, 10.0, 70.0)])
    assert (factor, exponent) == (pytest.approx(3.0), pytest.approx(1.5))
    assert spread([1.0]) is None and spread([1.0, 2.0, 4.0]) == 1.0
