"""Which backend runs a call: the reason, said once; each one forced; the table's measured times decide where both could run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import pytest
import torch

import fastlora
from fastlora import backend
from fastlora.kernels import tiles

HALF = tiles.Call(90, "half", 16, True)


@pytest.fixture
def on_a_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    """x (1600, 8) that says it lies on an sm_90 GPU, where Triton is installed."""

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(backend, "_triton_missing", lambda: None)
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    yield torch.zeros(1600, 8, dtype=torch.bfloat16).as_subclass(OnCuda)


def measured(monkeypatch: pytest.MonkeyPatch, *points: tiles.Measured) -> None:
    """Put these measurements into the row of `HALF`."""
    rows = tuple(dataclasses.replace(row, measured=points) if row is tiles.row_of(HALF) else row for row in tiles.TABLE)
    monkeypatch.setattr(tiles, "TABLE", rows)
    tiles.row_of.cache_clear()
    monkeypatch.setattr(tiles, "row_of", tiles.row_of.__wrapped__)


def test_a_machine_without_a_gpu_gets_eager_and_the_reason() -> None:
    chosen, reason = backend.choose(torch.zeros(3, 4), 2)
    assert chosen == "eager" and reason
    assert backend.describe()["cpu"] == f"{chosen}: {reason}"


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    backend._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "fastlora"):
        for _ in range(3):
            fastlora.lora_linear(
                torch.zeros(3, 4), torch.zeros(4, 4), None, torch.zeros(1, 4), torch.zeros(4, 1), scale=1.0, dropout=0.5
            )
    assert len(caplog.records) == 1 and "backend 'eager'" in caplog.text


@pytest.mark.parametrize("forced", ["triton", "eager", "reference"])
def test_each_backend_can_be_forced(forced: str, on_a_hopper: torch.Tensor) -> None:
    assert backend.choose(on_a_hopper, 2, True, forced) == (forced, "asked for")


def test_what_triton_cannot_run_says_why(on_a_hopper: torch.Tensor) -> None:
    for x, rank, words in (
        (on_a_hopper.double(), 2, "float64"),
        (on_a_hopper.float(), 64, "rank 64 is above 16"),
        (torch.zeros(3, 4, device="meta"), 2, "x is on meta"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            chosen, reason = backend.choose(x, rank)
            assert chosen == "eager" and words in reason
            with pytest.raises(RuntimeError, match=words):
                backend.choose(x, rank, forced="triton")


def test_nothing_measured_means_triton(on_a_hopper: torch.Tensor) -> None:
    chosen, reason = backend.choose(on_a_hopper, 2, True)
    assert chosen == "triton" and reason.startswith("a GPU and Triton are there")


def test_eager_where_it_was_measured_faster(on_a_hopper: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tiles.Measured("one card", 1600, triton=50.0, eager=40.0), tiles.Measured("one card", 6304, 90.0, 120.0)
    measured(monkeypatch, small, large)
    chosen = {m: backend.choose(on_a_hopper[:1].expand(m, 8), 2, True)[0] for m in (1, 1600, 6303, 6304, 50432)}
    assert chosen == {1: "eager", 1600: "eager", 6303: "eager", 6304: "triton", 50432: "triton"}
    assert backend.choose(on_a_hopper, 2, True)[1] == "measured faster: 40 against 50 µs at 1600 rows on one card"
    # another class has measurements of its own, or none
    assert backend.choose(on_a_hopper, 2, False)[0] == "triton"
    assert backend.choose(on_a_hopper, 2, True, forced="triton")[0] == "triton"


def test_measurements_are_read_under_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, tiles.Measured("one card", 4, triton=1.0, eager=2.0))
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)

    @torch.compile(fullgraph=True, backend="eager")
    def slower_at(x: torch.Tensor) -> torch.Tensor:
        return x * backend._measurements(x.device, "half", 2, True)[0].eager

    assert slower_at(torch.ones(2))[0] == 2.0


def test_the_tables_measurements_are_in_order_and_real() -> None:
    for row in tiles.TABLE:
        assert [p.rows for p in row.measured] == sorted({p.rows for p in row.measured})
        assert all(p.gpu and p.triton > 0 and p.eager > 0 for p in row.measured)
