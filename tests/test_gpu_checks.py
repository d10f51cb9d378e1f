"""The checks that run on a GPU, at tiny sizes without one: green where all is right, red for each fault put in."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import eager, rng
from fastlora.kernels import candidates, tiles
from fastlora.kernels import lora_linear as kernels
from fastlora.kernels.tiles import Plan
from fastlora.verdicts import Book
from gpu.checks import forms, judged, mask_bits, products, replays, table_rows, verdict
from kernels_support import DEVICE, ONE_PASS, TWO_PASSES
from trust_support import GPU

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_gpu.py runs it, at real size")
ORIGINAL = SimpleNamespace(forward=eager.forward, backward=eager.backward)
# changes the named results of one call of a direction, and may read its arguments
Fault = Callable[[dict[str, Any], dict[str, Any]], None]


class Kernels:
    """In place of the kernels: eager's results, which are quick, with a fault put in for all plans or for some."""

    def __init__(self) -> None:
        self.fault: Fault = lambda results, arguments: None
        self.wrong: set[Plan | None] | None = None

    def run(self, direction: str, names: tuple[str, ...], positional: tuple[Any, ...], plan: Plan | None, named: Any) -> Any:
        values = dict(zip(ARGUMENTS[direction], positional, strict=False)) | named
        results = dict(zip(names, getattr(ORIGINAL, direction)(**values), strict=True))
        if self.wrong is None or plan in self.wrong:
            self.fault(results, values)
        return tuple(results.values())

    def forward(self, *positional: Any, plan: Plan | None = None, **named: Any) -> Any:
        return self.run("forward", ("y", "s"), positional, plan, named)

    def backward(self, *positional: Any, plan: Plan | None = None, **named: Any) -> Any:
        return self.run("backward", ("dx", "da", "db"), positional, plan, named)


ARGUMENTS = {
    "forward": ("x", "weight", "bias", "a", "b", "spec", "seed", "rows"),
    "backward": ("dy", "x", "s", "weight", "a", "b", "spec", "seed", "rows", "needs"),
}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The kernels of `Kernels`, without a fault yet."""
    ours = Kernels()
    monkeypatch.setattr(kernels, "forward", ours.forward)
    monkeypatch.setattr(kernels, "backward", ours.backward)
    return ours


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Book:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Book(GPU)


class TestTableRows:
    def test_every_class_once(self) -> None:
        rows = table_rows(CPU, 7, 32)
        assert len({row.name for row in rows}) == len(rows) == 24
        kinds = {row.kind for row in rows}
        assert {(kind.precision, kind.rank) for kind in kinds} == {
            (precision, rank) for precision, most in tiles.MAX_RANK.items() for rank in (16, 32, 64, 128) if rank <= most
        }
        assert {kind.dropout for kind in kinds} == {False, True}

    @pytest.mark.parametrize("before", ["ieee", "tf32"])
    def test_tf32_is_put_back(self, before: tiles.Precision) -> None:
        with products(before):
            for row in table_rows(CPU, 7, 32, ranks=[16], dropouts=[0.0]):
                assert {call.kind.call for call in row.calls()} == {row.kind}
            with pytest.raises(ZeroDivisionError), products("tf32"):
                assert torch.backends.cuda.matmul.allow_tf32
                raise ZeroDivisionError
            assert torch.backends.cuda.matmul.allow_tf32 == (before == "tf32")

    def test_forms(self) -> None:
        kind = tiles.Call(90, "half", 16, True)
        plans = forms(kind)
        assert plans[0] == tiles.choose(kind) and len(set(plans)) == len(plans)
        names = ("one_pass_forward", "one_pass_backward", "da_in_epilogue", "groups_together")
        for name in names:
            assert {getattr(plan, name) for plan in plans} == {False, True}


def unwritten(name: str) -> Fault:
    """The last column of a result is left as torch.empty gave it."""

    def fault(results: dict[str, Any], arguments: dict[str, Any]) -> None:
        if (right := results.get(name)) is not None:
            results[name] = torch.empty(right.shape, dtype=right.dtype)
            results[name][..., :-1] = right[..., :-1]

    return fault


class TestJudged:
    @interpreted
    def test_the_tables_rows(self, book: Book) -> None:
        (row,) = table_rows(CPU, 19, 40, dtypes=[torch.float16], ranks=[3], dropouts=[0.25])
        for call in row.calls():
            found = judged(call, book)
            assert found.right and found.plan == tiles.choose(row.kind) and found.worst is not None and 0 < found.worst <= 1
            assert json.loads(json.dumps(found.facts()))["red"] == []

    @pytest.mark.parametrize("name", ["y", "s", "dx", "da", "db"])
    def test_what_is_left_unwritten_shows(self, name: str, faulty: Kernels, book: Book) -> None:
        faulty.fault = unwritten(name)
        (row,) = table_rows(CPU, 19, 40, dtypes=[torch.float32], ranks=[3], dropouts=[0.25])[:1]
        forward, backward = (verdict(call, book) for call in row.calls())
        wrong = forward if name in ("y", "s") else backward
        assert not wrong.right and re.search(rf"\b{name}(\[\d\])?: got nan", wrong.what)
        assert (forward if wrong is backward else backward).right

    def test_where_the_tables_plan_is_red_the_next_serves(self, faulty: Kernels, book: Book) -> None:
        (row,) = table_rows(CPU, 19, 40, dtypes=[torch.float16], ranks=[3], dropouts=[0.25])
        plans = candidates.candidates(row.kind, "backward")
        faulty.fault, faulty.wrong = unwritten("dx"), set(plans[:2])
        _, call = row.calls()
        found = judged(call, book)
        assert not found.right and found.plan == plans[2] and [plan for plan, _ in found.red] == plans[:2]
        assert "dx: got nan" in str(found) and "dx: got nan" in found.facts()["red"][0]["what"]
        faulty.wrong = None
        with pytest.raises(AssertionError, match=r"no plan is right for backward dx dA dB, 40→120.*dx: got nan"):
            judged(call, book)

    def test_nothing_to_compare(self, faulty: Kernels, book: Book) -> None:
        (row,) = table_rows(CPU, 0, 40, dtypes=[torch.float16], ranks=[3], dropouts=[0.25])
        with pytest.raises(AssertionError, match="nothing to compare"):
            judged(row.calls()[0], book)


def other_mask(results: dict[str, Any], arguments: dict[str, Any], name: str, **changes: Any) -> None:
    """A result with the mask that other arguments give."""
    if name in results:
        spec = dataclasses.replace(arguments["spec"], **changes.pop("spec", {}))
        direction = "forward" if name in ("y", "s") else "backward"
        names = ("y", "s") if direction == "forward" else ("dx", "da", "db")
        again = dict(zip(names, getattr(ORIGINAL, direction)(**arguments | {"spec": spec} | changes), strict=True))
        results[name] = again[name]


class TestMaskBits:
    @interpreted
    @pytest.mark.parametrize(
        ("plan", "dtype", "dropout", "identities"),
        [(ONE_PASS, torch.float16, 0.25, True), (TWO_PASSES, torch.float32, 0.375, False)],
        ids=["one-pass", "two-passes"],
    )
    def test_interpreted(self, plan: Plan, dtype: torch.dtype, dropout: float, identities: bool) -> None:
        facts = mask_bits(CPU, 33, 133, 2, plan, dtype, dropout=dropout, identities=identities, width=16)
        assert facts["bits"] == 3 * 2 * 33 * 133 and abs(facts["kept"] - 1 + dropout) < 0.02
        assert json.dumps(facts)

    @pytest.mark.parametrize("name", ["s", "dx", "da"])
    @pytest.mark.parametrize(
        "changes",
        [
            {"spec": {"groups": (0, 0, 2)}},
            {"spec": {"groups": (0, 1, 1)}},
            {"spec": {"site": 6}},
            {"spec": {"dropout": 0.5}},
            {"seed": torch.tensor([12345])},
            {"rows": torch.arange(100)},
        ],
        ids=["one group twice", "the last group's", "site", "dropout", "half of the seed", "row numbers"],
    )
    def test_another_mask(self, changes: dict[str, Any], name: str, faulty: Kernels) -> None:
        assert mask_bits(CPU, 100, 133, dtype=torch.float32, width=16)["bits"] == 3 * 3 * 100 * 133
        faulty.fault = lambda results, arguments: other_mask(results, arguments, name, **changes)
        group = {"(0, 0, 2)": 1, "(0, 1, 1)": 2}.get(str(changes.get("spec", {}).get("groups")), 0)
        with pytest.raises(AssertionError, match=rf"the mask of {name.replace('da', 'dA')} of group {group}.* is not fastlora"):
            mask_bits(CPU, 100, 133, dtype=torch.float32, width=16)

    @pytest.mark.parametrize("place", [(0, 0), (99, 132), (96, 95), (31, 128)], ids=str)
    @pytest.mark.parametrize("group", [0, 2])
    def test_a_single_bit(self, group: int, place: tuple[int, int], faulty: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
        right = rng.keep_mask

        def keep_mask(seed: Tensor, site: int, which: int, *rest: Any) -> Tensor:
            mask = right(seed, site, which, *rest)
            mask[place] ^= which == group
            return mask

        monkeypatch.setattr(rng, "keep_mask", keep_mask)
        with pytest.raises(AssertionError, match=rf"s of group {group}.*: 1 of 1600 sums of bits differ, .* \[{place[0]}, "):
            mask_bits(CPU, 100, 133, dtype=torch.float32, width=16)

    def test_what_is_left_unwritten_shows(self, faulty: Kernels) -> None:
        for name in ("s", "dx", "da"):
            faulty.fault = unwritten(name)
            with pytest.raises(AssertionError, match=rf"mask of {name.replace('da', 'dA')} .* got nan"):
                mask_bits(CPU, 20, 40, dtype=torch.float16, width=16)


class TestReplays:
    @interpreted
    def test_interpreted(self) -> None:
        facts = replays(CPU, 20, 40, 1, dtype=torch.float16, plan=ONE_PASS, width=16)
        assert facts["replays"] == 2 and json.dumps(facts)

    def test_a_graph_that_does_nothing(self, faulty: Kernels) -> None:
        with pytest.raises(AssertionError, match=r"replay 1 of .*: 720 of 720 values of y are not those of a plain call"):
            replays(CPU, 15, 40, dtype=torch.float16, width=16, capture=lambda step: lambda: None)

    @pytest.mark.parametrize("name", ["y", "s", "dx", "da", "db"])
    def test_a_result_that_differs_later(self, name: str, faulty: Kernels) -> None:
        calls: list[str] = []

        def fault(results: dict[str, Any], arguments: dict[str, Any]) -> None:
            calls.extend(results.keys() & {name})
            if len(calls) == 5 and name in results:  # two plain calls, and two replays
                results[name].flatten()[-1].add_(1)

        faulty.fault = fault
        with pytest.raises(AssertionError, match=rf"replay 3 of .*: 1 of .* values of {name} are not"):
            replays(CPU, 15, 40, dtype=torch.float32, width=16)

    def test_a_seed_that_was_captured_by_value(self, faulty: Kernels) -> None:
        held: list[Tensor] = []

        def fault(results: dict[str, Any], arguments: dict[str, Any]) -> None:
            held.append(arguments["seed"].clone())
            if len(held) > 4:
                changed = {"seed": torch.ones_like(held[0])}
                for name in results:
                    other_mask(results, arguments, name, **changed)

        faulty.fault = fault
        with pytest.raises(AssertionError, match=r"the first with another seed: .* values of y are not"):
            replays(CPU, 15, 40, 2, dtype=torch.float32, width=16)

    def test_a_mask_that_no_seed_changes(self, faulty: Kernels) -> None:
        def fault(results: dict[str, Any], arguments: dict[str, Any]) -> None:
            for name in results:
                other_mask(results, arguments, name, seed=torch.zeros((), dtype=torch.int64))

        faulty.fault = fault
        with pytest.raises(AssertionError, match="another seed does not change the mask"):
            replays(CPU, 15, 40, 2, dtype=torch.float32, width=16)
