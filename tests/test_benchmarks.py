"""Each benchmark once at a size that proves nothing but that it runs; the gate refuses what is wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import step_gate
import steps
from baselines import TRAINEES, Job, prompts
from baselines.textbook import NaiveLinear, Textbook
from bench_support import BENCHMARKS, changed, copy_of_tree, names, run_benchmark
from fastlora.bench.rows import MODEL
from machine import Ceilings
from measure import by_clock, saved_bytes, summary
from memory import ready
from ops import CONTESTANTS, Drop, FastLoRA, LayerForward, bind, gate, phase_calls
from ops import Textbook as NaiveOp
from shapes import Case, InputSet

CASES = [
    Case("linear", 24, 32, 48, rank=4),
    Case("qkv", 24, 32, 96, 3, 4, 0.25),
    Case("qkv", 24, 32, 96, 3, 2, 0.25, torch.bfloat16),
    Case("mlp", 24, 32, 64, 1, 4, 0.25),
]
TINY = Job("mini", classes=3, batch=2)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git: nothing says what is untracked")
def test_pytest_benchmarks_write_rows_and_leave_nothing_untracked(tmp_path: Path) -> None:
    """As README has it, in a copy: every contestant that can run here is timed in every phase, beside the floor."""
    copy_of_tree(tmp_path)
    command = ["-m", "pytest", "benchmarks/", "--benchmark-only", "--profile", "tiny", "-p", "no:xdist"]
    rows = run_benchmark(*command, folder=tmp_path / "benchmarks" / "local", cwd=tmp_path)
    assert changed(tmp_path) == ""
    assert rows[0]["row"] == "run" and {"commit", "versions", "cpu", "date", "threads"} <= rows[0].keys()
    timed = [row for row in rows if row["row"] == "step"]
    ops = [row for row in rows if row["row"] == "op"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiler = device == "cuda"  # on a CPU the full profile only
    runs = {name for name, trainee in TRAINEES.items() if trainee.missing() is None and (compiler or not trainee.compiles)}
    assert names(timed) == runs
    case = Case("qkv", 24, 32, 96, 3, device=device)
    assert names(ops) == {c.name for c in CONTESTANTS if c.missing(case) is None}
    assert {row["phase"] for row in ops} == {"forward", "backward", "both"}
    for row in [*timed, *ops]:
        assert row["median_ms"] > 0 and row["over_frozen"] > 0
        assert row.get("share_of_roofline", row.get("share_of_gemm_speed", 0.0)) > 0
    assert all(row["flops"] > 0 and row["saved_bytes"] > 0 for row in timed)


def test_the_default_profile_has_a_real_step() -> None:
    """ViT-B-32 with 10 classes beside the mini CLIP on a CPU."""
    from test_step import MAIN, cases

    assert [(job.model, job.classes, job.batch) for job in cases("quick", "cpu")] == [("mini", 10, 32), (MODEL, 10, 32)]
    assert set(MAIN) <= TRAINEES.keys()


def test_cpu_script_runs_at_tiny_size_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Every part; each row has what the tables need."""
    from cpu import PARTS, main
    from fastlora.bench.rows import read
    from fastlora.bench.tables import everything

    rows = run_benchmark(str(BENCHMARKS / "cpu.py"), "--tiny", "--runs", "1", "--out", str(tmp_path), folder=tmp_path)
    assert {row["row"] for row in rows} >= {"run", "ceilings", "step", "op", "scaling", "agreement", "counted", "end"}
    assert {path.name for path in tmp_path.iterdir()} == {f"run1-{name}.jsonl" for name in PARTS}
    assert all(row["warm_up"] == steps.WARM_UP for row in rows if row["row"] in ("step", "scaling", "savings"))
    titles = {table.title.split(":")[0] for table in everything(read(tmp_path))}
    assert {
        "Machine",
        "One training step",
        "What each saving is worth",
        "Kept memory",
        "One adapted layer",
        "Cost as work grows",
        "Another person's check",
    } <= titles
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(["--tiny", "--runs", "1", "--out", str(tmp_path)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(["--tiny", "--runs", "1", "--out", str(tmp_path), "--fresh", "--only", "^counted"]) == 0
    after = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert [path.name for path in after if after[path] != before[path]] == ["run1-counted.jsonl"]


def test_engines_are_held_against_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step or two of each; what is there is not done again."""
    import engines

    monkeypatch.setattr(engines, "SETS", {"digits": {"shots": 1, "iterations": 2}})
    monkeypatch.setattr(engines, "WAYS", ("plain loop", "eager"))
    monkeypatch.setattr(engines, "OUT", tmp_path / "engines.jsonl")
    monkeypatch.setattr("sys.argv", ["engines.py", "--seeds", "1", "--out", str(engines.OUT)])
    engines.main()
    first = engines.OUT.read_text()
    engines.main()
    assert engines.OUT.read_text() == first
    plain, eager = map(json.loads, first.splitlines())
    assert abs(plain["accuracy"] - eager["accuracy"]) < 5  # both still nearly at the start, which is the same
    assert "| digits | eager |" in engines.table()


def test_a_contestant_that_the_gate_refuses_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(name: str, job: Job) -> Any:
        assert name != "textbook", "textbook is wrong, so it is not timed"
        return ready(TRAINEES[name], job)

    monkeypatch.setattr(steps, "checked", checked)
    job = Job("mini", batch=2, classes=3, depth=2, width=64)
    rows = steps.side_by_side(job, ["frozen", "textbook", "fastlora"], 1, Ceilings("cpu", "float32", 1e11, 1e10))
    assert {row["contestant"]: "median_ms" in row for row in rows} == {"textbook": False, "frozen": True, "fastlora": True}
    assert "textbook is wrong" in next(row["refused"] for row in rows if row["contestant"] == "textbook")


def test_contestants_take_turns_and_their_first_steps_are_not_counted() -> None:
    turns: list[tuple[str, int]] = []

    def take(name: str, number: int) -> float:
        turns.append((name, number))
        return float(number)

    taken = steps.in_turn({name: functools.partial(take, name) for name in "ab"}, 2, "job")
    assert turns == [(name, number) for number in range(1, steps.WARM_UP + 3) for name in "ab"]
    assert all(found.seconds == [steps.WARM_UP + 1, steps.WARM_UP + 2] for found in taken.values())
    assert all(len(found.page_faults) == 2 for found in taken.values())


def test_the_check_from_outside_is_warmed_up_alike() -> None:
    import plain

    assert plain.WARM_UP == steps.WARM_UP


def test_a_step_in_chunks_is_the_whole_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted: the image tower and the rest once, the chunk as often as the step has chunks."""
    clock = iter([0.0, 1.0, 3.0, 3.5])
    monkeypatch.setattr(steps.time, "perf_counter", lambda: next(clock))
    contestant = ready(Textbook, Job("mini", classes=20, batch=2))
    contestant.model.zero_grad()
    assert steps.seconds_in_chunks(contestant, 1, size=5) == 1.0 + 2.0 * 4 + 0.5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("contestant", [c for c in CONTESTANTS if c.missing(CASES[0]) is None], ids=lambda c: c.name)
def test_gate_lets_the_contestants_pass(contestant: Any, case: Case) -> None:
    failed = [line for ok, line in gate(contestant, case) if not ok]
    assert not failed


class WrongScale(NaiveOp):
    """Naive LoRA that forgets to scale its update right, by a tenth."""

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        return super().prepare(dataclasses.replace(inputs, case=_Scaled(**vars(inputs.case))), drop)


class _Scaled(Case):
    scale = 0.55  # type: ignore[assignment]  # the right one is 1 / sqrt(4)


class NoDropout(FastLoRA):
    """fastlora, with its dropout lost, as on hosts that ignore it."""

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        return super().prepare(dataclasses.replace(inputs, case=dataclasses.replace(inputs.case, dropout=0.0)), drop)


class NaNs(NaiveOp):
    """One element never written."""

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        right = super().prepare(inputs, drop)

        def forward(x: Tensor, layer: Any, site: int) -> list[Tensor]:
            hole = torch.zeros_like(x[:1, :1])
            return [
                y + torch.where(hole == 0, torch.nan, hole) * (torch.arange(y.shape[1]) == 5) for y in right(x, layer, site)
            ]

        return forward


@pytest.mark.parametrize("wrong", [WrongScale(), NoDropout("eager"), NaNs()], ids=lambda w: type(w).__name__)
def test_gate_refuses(wrong: Any) -> None:
    assert not all(ok for ok, _ in gate(wrong, CASES[1]))


class Detached(NaiveLinear):
    """The right output, no gradient of A."""

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(x, self.lora_A).detach() + 0 * self.lora_A.sum()
        return self.linear(x) + self.scale * nn.functional.linear(low, self.lora_B)


class SlightlyOff(NaiveLinear):
    """An update one part in a thousand too large."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + 1.001 * self.scale * (x @ self.lora_A.T @ self.lora_B.T)


class NoBias(NaiveLinear):
    """A dropped term."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - self.linear.bias


def wrong(module: type[NaiveLinear]) -> type[Textbook]:
    """The textbook with another linear."""

    class Wrong(Textbook):
        def adapted(self, linear: nn.Linear, a: Tensor, b: Tensor) -> nn.Module:
            return module(linear, a, b, self.job.scale, self.job.dropout)

    return Wrong


class NotCausal(Textbook):
    """A text tower whose attention mask is lost."""

    def install(self, adapters: Any) -> None:
        super().install(adapters)
        self.model.attn_mask = None


def verdict(trainee: Any) -> dict[str, bool]:
    return {line.split(":")[0]: ok for ok, line in step_gate.gate(trainee, TINY)}


def test_step_gate_refuses_what_is_wrong() -> None:
    """A gradient that is not there; a scale off by a thousandth; a lost term; a lost mask: each shows where it should."""
    found = verdict(wrong(Detached))
    assert found["logits"] and not found["vision dA"] and not found["text dA"]
    assert not any(verdict(wrong(SlightlyOff)).values())
    assert not verdict(wrong(NoBias))["logits"]
    found = verdict(NotCausal)
    assert not found["logits"] and not found["text dA"]


@pytest.mark.parametrize("name", ["frozen", "full fine-tuning"])
def test_step_gate_refuses_a_host_that_is_wrong(name: str) -> None:
    """Those without adapters have one truth, each its own gradients of it: none missing, none a thousandth off."""

    class Off(TRAINEES[name]):  # type: ignore[misc]
        def gradients(self) -> dict[str, Tensor]:
            return {key: 1.001 * value for key, value in super().gradients().items()}

    class Missing(TRAINEES[name]):  # type: ignore[misc]
        def gradients(self) -> dict[str, Tensor]:
            return dict(list(super().gradients().items())[1:])

    kind = "dx" if name == "frozen" else "dW"
    right, off = verdict(TRAINEES[name]), verdict(Off)
    assert all(right.values()) and right.keys() == off.keys()
    assert {key for key, ok in off.items() if not ok} == {key for key in right if kind in key} == right.keys() - {"logits"}
    with pytest.raises(KeyError):
        verdict(Missing)


def test_lost_dropout_is_noticed() -> None:
    """As on nn.MultiheadAttention, whose `out_proj` and `in_proj_weight` are read but never called."""

    class NoDropout(Textbook):
        def adapted(self, linear: nn.Linear, a: Tensor, b: Tensor) -> nn.Module:
            return NaiveLinear(linear, a, b, self.job.scale, 0.0)

    assert not step_gate.drops_out(ready(NoDropout, TINY)) and step_gate.drops_out(ready(TRAINEES["fastlora"], TINY))


def test_backward_alone_can_be_repeated() -> None:
    """The backward phase runs many times over one kept forward, with the same result."""
    bound = bind(FastLoRA("eager"), InputSet.draw(CASES[1], 1))
    (call,) = phase_calls([bound], "backward")
    first, second = call(), call()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[call-overload]


def test_work_counts_an_ideal_pass() -> None:
    """By hand: m=2, k=3, n=4, r=1, one group, fp32."""
    case = Case("linear", 2, 3, 4, rank=1)
    assert case.work("forward") == (2 * 2 * 3 * 4 + 2 * 2 * 3 + 2 * 2 * 4, 4 * (6 + 8 + 12))
    assert case.work("both")[0] == sum(case.work(p)[0] for p in ("forward", "backward"))


def test_roofline_is_the_slower_of_the_two_floors() -> None:
    limits = Ceilings("cpu", "float32", flops=100.0, bandwidth=10.0)
    assert limits.seconds(200.0, 10.0) == 2.0 and limits.seconds(100.0, 50.0) == 5.0


def test_summary_gives_median_and_quantiles() -> None:
    timing = summary([float(i) for i in range(11, 0, -1)], "clock")
    assert (timing.median, timing.low, timing.high, timing.rounds) == (6.0, 2.0, 10.0, 11)


def test_calls_rotate_over_input_sets() -> None:
    seen: list[int] = []
    by_clock([lambda i=i: seen.append(i) for i in range(3)], torch.device("cpu"), 0.0, least=6)  # type: ignore[misc]
    assert seen[-6:] == [0, 1, 2, 0, 1, 2]


def test_saved_bytes_counts_each_storage_once_and_no_parameter() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    # both products keep x; the second keeps the weight for dx too, which is a parameter
    assert saved_bytes(lambda: (x @ weight, x @ weight), [weight]) == x.nbytes


def test_prompts_have_the_lengths_of_imagenets() -> None:
    """8 to 18 tokens and 9.2 on average, start and end tokens counted."""
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32")(prompts(Job(classes=1000)))
    lengths = (tokens != 0).sum(1)
    assert (int(lengths.min()), int(lengths.max())) == (8, 18) and 9.0 < lengths.float().mean() < 9.4
