"""measure(): what is timed, what is kept and used afterwards, one rank for all; with a faked clock, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import nn

import fastlora
from fastlora import backend, fastest, trust, verdicts
from fastlora.kernels import candidates
from fastlora.kernels import lora_linear as kernels
from fastlora.verdicts import Book, Key
from kernels_support import DEVICE, ONE_PASS, TWO_PASSES
from models import tiny
from trust_support import GPU, new_process, pretend


@dataclasses.dataclass
class Ran:
    """Which plans ran, "eager" or Triton's, and what the clock says of each of them: a lower number is faster."""

    plans: list[Any] = dataclasses.field(default_factory=list)
    times: dict[Any, float] = dataclasses.field(default_factory=dict)
    wrong: Any = "none"


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ran]:
    """A machine whose GPU nobody has measured: the kernels give eager's results, or wrong ones for the plan that is `wrong`."""
    ran = Ran()
    plain = SimpleNamespace(forward=fastest.eager.forward, backward=fastest.eager.backward)

    def runs(direction: str, eager: bool) -> Any:
        def run(*args: Any, plan: Any = None, **named: Any) -> Any:
            ran.plans.append("eager" if eager else plan)
            results = getattr(plain, direction)(*args, **named)
            if not eager and plan == ran.wrong:
                next(value for value in results if value is not None).add_(1)
            return results

        return run

    def bench(call: Any, return_mode: str) -> float:
        call()
        return ran.times[ran.plans[-1]]

    pretend(monkeypatch, tmp_path)
    monkeypatch.setattr(candidates, "candidates", lambda call, direction: [TWO_PASSES, ONE_PASS])
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    for direction in ("forward", "backward"):
        monkeypatch.setattr(kernels, direction, runs(direction, False))
        monkeypatch.setattr(fastest.eager, direction, runs(direction, True))
    yield ran
    new_process()


class Adapted(nn.Module):
    """One linear layer, (24,) -> (16,)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def adapted() -> Adapted:
    model = Adapted().to(DEVICE).train()
    fastlora.patch(model, modules=("fc",), rank=3)
    return model


def train(model: nn.Module) -> None:
    model(torch.randn(5, 24, device=DEVICE, requires_grad=True)).square().sum().backward()


def test_the_fastest_is_kept_and_used(made_up: Ran) -> None:
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 1e-3, "eager": 2e-3}
    model = adapted()
    result = backend.measure(model, rows=40)
    assert [(kind.direction, kind.needs) for kind, _ in result.found] == [
        ("forward", (False,) * 3), ("backward", (True,) * 3), ("backward", (False, True, True))
    ]  # fmt: skip
    assert all(
        (choice.plan, choice.time, choice.eager, choice.table) == (ONE_PASS, 1.0, 2.0, 3.0) for _, choice in result.found
    )
    first, *rest = str(result).splitlines()
    assert first == "fastest on Made-up 4000:" and len(rest) == 3
    assert "forward, 24→16, float32" in rest[0] and "dropout 0.25, bias" in rest[0] and "one_pass_forward" in rest[0]
    assert "1.0 µs at 40 rows (eager 2.0 µs, the table's row 3.0 µs)" in rest[0]
    for process in (lambda: None, new_process):
        process()
        made_up.plans.clear()
        train(model)
        assert made_up.plans == [ONE_PASS, ONE_PASS]
    # another class, without dropout, has nothing kept: it is judged, and the table's row serves
    made_up.plans.clear()
    train(model.eval())
    assert made_up.plans[-1] is None


def test_eager_where_it_is_fastest(made_up: Ran) -> None:
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 2e-3, "eager": 1e-3}
    model = adapted()
    result = backend.measure(model, rows=40)
    assert all(choice.plan is None and choice.form == "eager" and choice.table == 3.0 for _, choice in result.found)
    new_process()
    made_up.plans.clear()
    train(model)
    assert made_up.plans == ["eager", "eager"]


@pytest.mark.parametrize("wrong", [ONE_PASS, TWO_PASSES], ids=["the fastest", "the table's row"])
def test_a_wrong_plan_is_not_timed(wrong: Any, made_up: Ran) -> None:
    right = TWO_PASSES if wrong == ONE_PASS else ONE_PASS
    made_up.times = {right: 2e-3, "eager": 3e-3}
    made_up.wrong = wrong
    for _, choice in backend.measure(adapted(), rows=40).found:
        assert choice.plan == right and choice.table == (2.0 if right == TWO_PASSES else None)


def test_a_class_that_stopped_the_gpu_is_left_out(made_up: Ran) -> None:
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 1e-3, "eager": 2e-3}
    model = adapted()
    (layer,) = fastest.layers(model)
    book = verdicts.book(layer.device)
    forward = next(iter(layer.calls(4))).kind
    book.note(forward, verdicts.Verdict(False, what="illegal memory access", stopped=True))
    result = backend.measure(model, rows=40)
    assert {kind.direction for kind, _ in result.found} == {"backward"}
    assert len(result.left_out) == 1 and "illegal memory access" in str(result)


def test_the_classes_of_a_patched_clip() -> None:
    model = tiny().train()
    fastlora.patch(model, targets=("q", "v"))
    found = fastest.layers(model)
    width = {model.visual.transformer.width, model.transformer.width}
    assert {(layer.n // layer.k, layer.spec.active) for layer in found} == {
        (3, (True, False, True)), (1, (True,)), (2, (False, True))
    }  # fmt: skip
    assert {layer.k for layer in found} == width and len(found) == 3 * len(width)
    assert all(layer.bias and layer.dropout and layer.dtype == torch.float32 for layer in found)
    with torch.autocast("cpu", torch.bfloat16):
        assert {layer.dtype for layer in fastest.layers(model.eval())} == {torch.bfloat16}
    assert not any(layer.dropout for layer in fastest.layers(model))


def test_without_a_gpu_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_triton_missing", lambda: "no CUDA or ROCm device")
    with pytest.raises(RuntimeError, match=r"measure\(\) times kernels on a GPU: no CUDA or ROCm device"):
        backend.measure(Adapted())


def test_nothing_to_measure_says_why(made_up: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no active adapter"):
        backend.measure(Adapted())
    monkeypatch.setattr(backend, "_worse", lambda *_: "measured faster")
    with pytest.raises(RuntimeError, match="no layer gets a Triton kernel: 24→16, rank 3: eager: measured faster"):
        backend.measure(adapted())


def ranks(rank: int, sent: list[Any]) -> Any:
    """torch.distributed as `rank` of two sees it; what rank 0 sends is in `sent`."""

    def broadcast(message: list[Any], src: int, device: Any) -> None:
        assert src == 0
        if rank == 0:
            sent[:] = message
        message[:] = sent

    return SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: rank,
        get_backend=lambda: "gloo", broadcast_object_list=broadcast,
    )  # fmt: skip


@pytest.mark.parametrize("machine", ["the same", "another"])
def test_other_ranks_take_what_rank_0_measured(
    machine: str, made_up: Ran, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[Any] = []
    model = adapted()
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 1e-3, "eager": 2e-3}
    monkeypatch.setattr(fastest, "dist", ranks(0, sent))
    first = backend.measure(model, rows=40)
    if machine == "another":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    new_process()
    monkeypatch.setattr(fastest, "dist", ranks(1, sent))
    monkeypatch.setattr(fastest, "_measure", lambda *_: pytest.fail("rank 1 measured"))
    assert backend.measure(model, rows=40) == first
    for process in (lambda: None, new_process):
        process()
        made_up.plans.clear()
        train(model)
        assert made_up.plans == [ONE_PASS, ONE_PASS]
    assert len(GPU.file().read_text().splitlines()) == 3, "each rank's machine has it once"


def test_what_stops_rank_0_stops_the_others_too(made_up: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(fastest, "dist", ranks(0, sent))
    monkeypatch.setattr(fastest, "_measure", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("1 GiB")))
    for rank in (0, 1):
        monkeypatch.setattr(fastest, "dist", ranks(rank, sent))
        with pytest.raises(RuntimeError, match="rank 0 could not measure: OutOfMemoryError: 1 GiB"):
            backend.measure(adapted(), rows=40)


def test_a_rank_with_another_gpu_keeps_to_its_own(made_up: Ran, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    sent: list[Any] = []
    model = adapted()
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 1e-3, "eager": 2e-3}
    monkeypatch.setattr(fastest, "dist", ranks(0, sent))
    backend.measure(model, rows=40)
    other = dataclasses.replace(GPU, gpu="Made-up 5000")
    monkeypatch.setattr(Key, "of", classmethod(lambda cls, device: other))
    new_process()
    monkeypatch.setattr(fastest, "dist", ranks(1, sent))
    backend.measure(model, rows=40)
    assert not Book(other).choices and "Made-up 5000" in caplog.text


def test_a_kept_plan_that_fails_gives_way_to_eager(made_up: Ran, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 1e-3, "eager": 2e-3}
    model = adapted()
    backend.measure(model, rows=40)
    new_process()

    def fails(**_: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(trust, "_kernels", lambda: SimpleNamespace(forward=fails, backward=fails))
    made_up.plans.clear()
    train(model)
    assert made_up.plans == ["eager", "eager"] and caplog.text.count("eager serves instead") == 2


def test_a_kept_plan_is_read_as_it_was_written(made_up: Ran) -> None:
    made_up.times = {TWO_PASSES: 3e-3, ONE_PASS: 1e-3, "eager": 2e-3}
    result = backend.measure(adapted(), rows=40)
    assert Book(GPU).choices == dict(result.found)
    line = json.loads(GPU.file().read_text().splitlines()[0])
    line["choice"]["plan"]["a_field_of_another_version"] = True
    GPU.file().write_text(json.dumps(line) + "\n")
    assert not Book(GPU).choices
