"""What is expected on an H100: predictions that hang together, and the cells that wait for what is measured there."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest

from expected import change, layer, layers, measured, model, product, step, steps, tables
from expected.measured import Rows, case_of
from expected.tables import CHANGES
from fastlora.bench.rows import Row

ROWS = (1600, 6304, 50432)
CASES = [case_of(m, k, rank, p) for m in ROWS for k in (768, 1024) for rank in (2, 16) for p in (0.0, 0.25)]


def test_the_machine_gives_the_products_it_was_fitted_to() -> None:
    for name, k, tflops in (("cuBLAS", 8192, 798), ("cuBLAS", 512, 553), ("Triton", 512, 450)):
        assert 2e-6 * 8192 * 8192 * k / product(name, 8192, k, 8192).both == pytest.approx(tflops, rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_floor_is_the_smallest_of_a_layer(case: Any) -> None:
    floor = layer(case, "frozen")
    for name in layers.CONTESTANTS:
        found = layer(case, name)
        assert found.forward > 0 and found.backward > 0 and found.arithmetic
        assert found.forward >= floor.forward and found.both >= floor.both


@pytest.mark.parametrize("name", layers.CONTESTANTS)
def test_a_layer_takes_longer_with_more_rows_and_with_dropout(name: str) -> None:
    for k in (768, 1024):
        times = [layer(case_of(m, k), name).both for m in ROWS]
        assert times == sorted(times) and times[0] < times[-1]
        assert all(layer(case_of(m, k, 16, 0.0), name).both <= layer(case_of(m, k), name).both for m in ROWS)


@pytest.mark.parametrize("kind", ["cuBLAS", "Triton"])
def test_products(kind: str) -> None:
    for k, n in ((768, 2304), (2304, 768), (1024, 3072), (3072, 1024)):
        times = [product(kind, m, k, n).both for m in ROWS]
        assert times == sorted(times) and times[0] < times[-1]
        for m, time in zip(ROWS, times, strict=True):
            assert time >= product("cuBLAS", m, k, n).both > 1e6 * 2 * m * k * n / model.LOOP


def test_steps() -> None:
    """By graph at most as long as written; more classes take longer and more memory; nothing is faster than ours."""
    for name in steps.CONTESTANTS:
        written, graph = ([step(n, name, engine) for n in (10, 100, 1000)] for engine in ("as written", "graph"))
        assert all(0 < g.both <= w.both for g, w in zip(graph, written, strict=True))
        for one, more in itertools.pairwise(graph):
            assert one.both < more.both and 0 < one.peak <= more.peak
        for expected, ours in zip(graph, (step(n, "fastlora", "graph") for n in (10, 100, 1000)), strict=True):
            assert name.startswith("fastlora") or (expected.both > ours.both and expected.peak > ours.peak)


def test_changes() -> None:
    for dropout, (phase, sizes, forms) in itertools.product((0.0, 0.25), CHANGES):
        expected = change(case_of(50432, 768, 16, dropout), phase, phase if sizes else "", sizes, **forms)
        assert 200 < expected.both < 1000


def test_measured_cells_are_filled_from_rows() -> None:
    case = case_of(50432, 768)
    rows: list[Row] = [
        {"row": "op", "case": case.name, "contestant": "frozen", "phase": "both", "method": "graph", "median_ms": 0.6},
        {"row": "op", "case": case.name, "contestant": "textbook", "phase": "both", "method": "graph", "median_ms": 1.5},
        {"row": "op", "case": case.name, "contestant": "PEFT", "phase": "both", "method": "events", "median_ms": 9.9},
        {"row": "step", "case": "ViT-B-16-quickgelu batch 32", "classes": 100, "contestant": "fastlora", "engine": "graph",
         "median_ms": 12.3},
        {"row": "step", "case": "ViT-B-16-quickgelu batch 32", "classes": 100, "contestant": "fastlora", "engine": "as written",
         "median_ms": 14.5, "peak_bytes": 4 * 2**30, "held_bytes": 2**30},
        *({"row": "gemm", "product": "x Wᵀ", "m": 6304, "k": 768, "n": 2304, "contestant": name, "median_ms": time}
          for name, time in (("cuBLAS", 0.05), ("Triton a", 0.2), ("Triton b", 0.1))),
        {"row": "tune", "case": case.name, "phase": "forward", "change": "as it stands", "median_ms": 0.456},
    ]  # fmt: skip
    text = tables.text(rows)
    assert "516 / 600" in text and re.search(r"\| 5\.\d\d / 2\.50 \|", text)
    assert "9900" not in text and "9,900" not in text  # not by graph
    assert re.search(r"\| 12\.3 \| 1\.\d\d \|", text) and re.search(r"\| 14\.5 \| 1\.\d\d \|", text) and "| 3.00 |" in text
    assert "/ 446 |" in text and "/ 0.50 |" in text and "| 456 |" in text
    assert Rows(rows).product("x Wᵀ", 6304, 768, 2304, "Triton") == 100
    assert dataclasses.replace(case, m=1).name not in text


def test_rows_of_another_gpu_are_left_out(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "ON_GPUS", tmp_path)
    for gpu in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        header, row = f'{{"row": "run", "gpu": "{gpu}"}}', '{"row": "op", "median_ms": 1.0}'
        (tmp_path / f"{gpu}.jsonl").write_text(f"{header}\n{row}\n")
    measured.gpu_rows.cache_clear()
    try:
        assert [row["env"]["gpu"] for row in measured.gpu_rows()] == ["NVIDIA H100 80GB HBM3"]
    finally:
        measured.gpu_rows.cache_clear()
