"""Kernels are used where they are right: a fault of every kind put in, under the name of a GPU that is not there."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from fastlora import eager, lora_linear, trust, verdicts
from fastlora.kernels import launch, tiles
from fastlora.kernels import lora_linear as kernels
from fastlora.verdicts import Key
from kernels_support import TWO_PASSES, Case, Inputs, make
from trust_support import GPU, new_process, pretend

CASE = Case(m=20, n=16, k=24, active=(True, False, True))
ORIGINAL = SimpleNamespace(forward=eager.forward, backward=eager.backward)
Fault = Callable[[dict[str, Any]], None]


class Kernels:
    """Kernels with a fault put in: it is given the results by name, and what was asked for, and changes them or raises.

    The results are eager's, which is quicker than Triton's interpreter, unless `interpreted` is set.
    """

    def __init__(self) -> None:
        self.fault: Fault = lambda results: None
        self.interpreted = False
        self.ran: Counter[str] = Counter()

    def compute(self, direction: str, plan: Any, arguments: dict[str, Any]) -> Any:
        self.ran[direction] += 1
        options = {"plan": plan or TWO_PASSES} if self.interpreted else {}
        return getattr(kernels if self.interpreted else ORIGINAL, direction)(**arguments, **options)

    def forward(self, plan: Any = None, **arguments: Any) -> Any:
        y, s = self.compute("forward", plan, arguments)
        self.fault({"y": y, "s": s, "arguments": arguments})
        return y, s

    def backward(self, plan: Any = None, **arguments: Any) -> Any:
        dx, da, db = self.compute("backward", plan, arguments)
        self.fault({"dx": dx, "da": da, "db": db, "needs": arguments["needs"]})
        return dx, da, db


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernels]:
    """Calls get the kernels, as on a GPU that nobody has measured; the cache folder is empty."""
    ours = Kernels()
    pretend(monkeypatch, tmp_path)
    monkeypatch.setattr(trust, "_kernels", lambda: ours)
    yield ours
    new_process()


def step(inputs: Inputs, needs: tuple[bool, bool, bool] = (True, True, True), forced: str | None = None) -> list[torch.Tensor]:
    """y, and the gradients that are needed, of one call."""
    x, a, b = (t.detach().requires_grad_(need) for t, need in zip((inputs.x, inputs.a, inputs.b), needs, strict=True))
    spec = inputs.case.spec
    y = lora_linear(
        x, inputs.weight, inputs.bias, a, b, scale=spec.scale, dropout=spec.dropout, seed=inputs.seed, site=spec.site,
        rows=inputs.rows, active=spec.active, backend=forced,
    )  # fmt: skip
    return [y.detach(), *torch.autograd.grad(y, [t for t in (x, a, b) if t.requires_grad], inputs.dy)]


def lines() -> list[dict[str, Any]]:
    """What the file of verdicts holds."""
    path = GPU.file()
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def eager_serves(inputs: Inputs, needs: tuple[bool, bool, bool] = (True, True, True)) -> bool:
    return all(torch.equal(one, other) for one, other in zip(step(inputs, needs), step(inputs, needs, "eager"), strict=True))


def test_right_kernels_are_trusted_and_later_processes_do_not_ask_again(
    made_up: Kernels, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up.interpreted = True
    inputs = make(CASE, torch.float32)
    got = step(inputs)
    assert made_up.ran == {"forward": 2, "backward": 2}, "once on drawn adapters, once for the answer"
    for ours, plain in zip(got, step(inputs, forced="eager"), strict=True):
        assert not torch.equal(ours, plain)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    written = lines()
    assert [(one["kind"]["direction"], one["verdict"]["right"]) for one in written] == [("forward", True), ("backward", True)]
    assert all(0 < one["verdict"]["worst"] <= 1 and one["key"]["gpu"] == "Made-up 4000" for one in written)
    monkeypatch.setattr(trust, "judge", lambda *_: pytest.fail("judged again"))
    for process in (lambda: None, new_process):
        process()
        step(make(dataclasses.replace(CASE, m=33), torch.float32, seed=1))
    assert made_up.ran == {"forward": 4, "backward": 4} and len(lines()) == 2 and not said(caplog)


def add(name: str, group: int | None = None, by: float = 0.01) -> Fault:
    """A result that is off by `by` times its largest value, in one group or all."""

    def fault(results: dict[str, Any]) -> None:
        if (value := results.get(name)) is not None:
            columns = {"y": 3, "s": 2, "da": 2, "db": 2, "dx": 1}[name]
            parts = value.chunk(columns, 1 if name in ("y", "s", "dx") else 0)
            part = value if group is None else parts[group]
            part += by * part.abs().max()

    return fault


def nan(name: str, at: int = -1) -> Fault:
    def fault(results: dict[str, Any]) -> None:
        if results.get(name) is not None:
            results[name].view(-1)[at] = float("nan")

    return fault


def only(needs: tuple[bool, bool, bool]) -> Fault:
    def fault(results: dict[str, Any]) -> None:
        if results.get("needs") == needs:
            add("da")(results)

    return fault


@pytest.mark.parametrize(
    ("fault", "direction", "names"),
    [
        pytest.param(add("y"), "forward", "y[0]", id="y"),
        pytest.param(add("y", 1), "forward", "y[1]", id="y of a group without adapter"),
        pytest.param(add("s", 1), "forward", "s[1]", id="s of one group"),
        pytest.param(nan("y"), "forward", "y[2]: got nan", id="NaN"),
        pytest.param(add("da"), "backward", "da[0]", id="dA"),
        pytest.param(add("db", 1), "backward", "db[1]", id="dB of one group"),
        pytest.param(add("dx", by=0.001), "backward", "dx", id="dx by a thousandth"),
        pytest.param(nan("da"), "backward", "da[1]: got nan", id="NaN in dA"),
    ],
)
def test_a_wrong_kernel_never_serves(
    fault: Fault, direction: str, names: str, made_up: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    made_up.fault, inputs = fault, make(CASE, torch.float32)
    other = {"forward": "backward", "backward": "forward"}[direction]
    caplog.set_level(logging.INFO, "fastlora")
    for process in (lambda: None, lambda: None, new_process):
        process()
        y, *grads = step(inputs)
        plain_y, *plain_grads = step(inputs, forced="eager")
        if direction == "forward":
            assert torch.equal(y, plain_y)
        else:
            assert all(torch.equal(one, two) for one, two in zip(grads, plain_grads, strict=True))
    assert made_up.ran == {direction: 1, other: 4}, "the other direction serves; this one ran once"
    wrong = next(one for one in lines() if one["kind"]["direction"] == direction)["verdict"]
    assert not wrong["right"] and names in wrong["what"]
    message, *more = said(caplog)
    assert not more, "said once"
    assert sum("eager serves" in record.getMessage() for record in caplog.records) == 2, "a later process notes it, once"
    assert "eager serves" in message and direction in message and names in message and "allowed" in message


def test_each_needs_is_judged_by_itself(made_up: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    made_up.fault, inputs = only((False, True, True)), make(CASE, torch.float32)
    step(inputs)
    assert not said(caplog)
    step(inputs, (False, True, True))
    assert len(said(caplog)) == 1 and "backward dA dB" in said(caplog)[0]
    ran = made_up.ran["backward"]
    step(inputs, (False, True, True))
    assert made_up.ran["backward"] == ran
    step(inputs)
    assert made_up.ran["backward"] == ran + 1


def test_what_a_b_of_zero_would_hide_is_seen(made_up: Kernels) -> None:
    """At a training's first step the update adds nothing: the check draws values of its own."""

    def no_update(results: dict[str, Any]) -> None:
        if "y" in results:
            x, weight, bias = (results["arguments"][name] for name in ("x", "weight", "bias"))
            results["y"].copy_(torch.nn.functional.linear(x, weight, bias))

    inputs = make(CASE, torch.float32)
    inputs.b = torch.zeros_like(inputs.b)
    made_up.fault = no_update
    step(inputs)
    assert lines()[0]["verdict"]["right"] is False
    assert "y[1]" not in lines()[0]["verdict"]["what"]


def test_each_check_draws_other_values_in_the_same_places() -> None:
    """A plan that leaves results unwritten must not pass by what the plan before it left in memory."""
    inputs = make(dataclasses.replace(CASE, layout="columns"), torch.float16)
    inputs.bias = inputs.bias[:1].expand(inputs.weight.shape[0])  # type: ignore[index]
    arguments = {name: getattr(inputs, name) for name in ("x", "weight", "bias", "a", "b", "seed", "rows")}
    call = trust.Call.forward(**arguments, spec=CASE.spec)
    first, second = (trust._drawn(call).arguments for _ in range(2))
    for name in ("x", "weight", "bias", "a", "b"):
        own = arguments[name]
        assert not torch.equal(first[name], second[name]) and first[name].dtype == own.dtype
        assert first[name].stride() == own.stride() and first[name].data_ptr() % 16 == own.data_ptr() % 16
        assert torch.equal(first[name], first[name].half().to(own.dtype)), "values that the compute dtype holds too"
    assert first["seed"] is arguments["seed"] and first["rows"] is arguments["rows"]


@pytest.mark.parametrize("fault", [None, nan("y"), nan("y", 0), nan("dx"), nan("dx", 0), add("da", 1), add("db")])
def test_the_truth_is_computed_some_rows_at_a_time(
    fault: Fault | None, made_up: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    part = trust._part

    def counted(call: trust.Call, rows: slice, *dtype: torch.dtype) -> trust.Call:
        parts.append(rows.stop - rows.start)
        return part(call, rows, *dtype)

    monkeypatch.setattr(trust, "_CHUNK", 3 * 8 * (4 * CASE.k + 5 * 3 * CASE.n))
    monkeypatch.setattr(trust, "_part", counted)
    made_up.fault = fault or made_up.fault
    step(make(dataclasses.replace(CASE, shuffled_rows=False), torch.float32))
    assert set(parts) == {2, 3}
    assert [one["verdict"]["right"] for one in lines()].count(False) == (fault is not None)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_the_calls_own_values_do_not_matter(value: float, made_up: Kernels) -> None:
    """GradScaler's first steps have infinite gradients, a head of zeros gives none, s may be zero: the verdict is the same."""
    inputs = make(CASE, torch.float32)
    inputs.dy, inputs.a = torch.full_like(inputs.dy, value), torch.zeros_like(inputs.a)
    step(inputs)
    assert [one["verdict"]["right"] for one in lines()] == [True, True]
    new_process()
    GPU.file().unlink()
    made_up.fault = lambda results: results["db"].mul_(7) if "db" in results else None
    step(inputs)
    assert [one["verdict"]["right"] for one in lines()] == [True, False]


def test_modes_that_watch_operations_do_not_see_the_check(made_up: Kernels) -> None:
    """Selective activation checkpointing would find operations in the forward that its recomputation has not."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    inputs = make(dataclasses.replace(CASE, dropout=0.0), torch.float32)
    x, a, b = (t.detach().requires_grad_() for t in (inputs.x, inputs.a, inputs.b))

    def policy(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        kept = operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(x: torch.Tensor) -> torch.Tensor:
        y = lora_linear(x, inputs.weight, None, a, b, scale=0.7, active=CASE.active)
        return torch.sin(y)

    y = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    y.sum().backward()
    assert made_up.ran and all(one["verdict"]["right"] for one in lines())


def test_a_kernel_that_fails_later_is_replaced(made_up: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    """The last batch of an epoch has another size: Triton may compile for it anew, and fail."""
    inputs = make(CASE, torch.float32)
    step(inputs)
    made_up.fault = raising(triton.runtime.errors.OutOfResources(2**20, 2**18, "shared memory"))
    assert eager_serves(inputs) and eager_serves(inputs)
    assert len(said(caplog)) == 2 and [one["verdict"]["right"] for one in lines()] == [True, True, False, False]


def test_a_call_without_rows_is_no_verdict(made_up: Kernels) -> None:
    step(make(dataclasses.replace(CASE, m=0), torch.float32))
    assert not lines() and not made_up.ran


NO_COMPILER = "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
ERRORS = {
    "compile": (triton.runtime.errors.PTXASError("ptxas died"), True),
    "launch": (triton.runtime.errors.OutOfResources(2**20, 2**18, "shared memory"), True),
    "no gcc": (RuntimeError(NO_COMPILER), False),
    "gcc fails": (FileNotFoundError(2, "No such file or directory", "gcc"), False),
    "out of memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), False),
    "out of memory in Triton": (RuntimeError("Triton Error [CUDA]: out of memory"), False),
}


def raising(error: Exception) -> Fault:
    def fault(results: dict[str, Any]) -> None:
        raise error

    return fault


@pytest.mark.parametrize(("error", "lasting"), ERRORS.values(), ids=ERRORS)
def test_a_kernel_that_fails_never_serves(
    error: Exception, lasting: bool, made_up: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    """What lies with the machine, not with the kernel, is tried again by the next process."""
    made_up.fault, inputs = raising(error), make(CASE, torch.float32)
    assert eager_serves(inputs) and eager_serves(inputs)
    assert made_up.ran == {"forward": 1, "backward": 1}
    assert len(said(caplog)) == 2 and all(type(error).__name__ in message for message in said(caplog))
    assert [one["verdict"]["right"] for one in lines()] == ([False, False] if lasting else [])
    new_process()
    made_up.fault = lambda results: None
    step(inputs)
    assert made_up.ran["forward"] == (1 if lasting else 3)


def test_a_kernel_known_to_be_right_may_still_lack_a_compiler(made_up: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    inputs = make(CASE, torch.float32)
    step(inputs)
    new_process()
    made_up.fault = raising(RuntimeError(NO_COMPILER))
    assert eager_serves(inputs) and len(said(caplog)) == 2
    assert all(one["verdict"]["right"] for one in lines())


def test_where_eager_raises_too_its_error_is_the_users(made_up: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("these arguments are at fault")

    made_up.fault = raising(RuntimeError("kernel"))
    monkeypatch.setattr(eager, "forward", refuse)
    with pytest.raises(ValueError, match="these arguments"):
        step(make(CASE, torch.float32))
    assert not lines()


def test_a_gpu_that_stopped_is_noted_first(made_up: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(CASE, torch.float32)

    def settle(x: torch.Tensor) -> None:
        if made_up.ran["forward"]:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with (
        monkeypatch.context() as stopped,
        pytest.raises(RuntimeError, match=r"forward.*illegal memory.*start the program again"),
    ):
        stopped.setattr(trust, "_settle", settle)
        step(inputs)
    assert [(one["verdict"]["right"], one["verdict"]["stopped"]) for one in lines()] == [(False, True)]
    new_process()
    y = step(inputs)[0]
    assert made_up.ran["forward"] == 1 and torch.equal(y, step(inputs, forced="eager")[0])


def test_an_error_of_before_is_not_the_kernels(made_up: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(x: torch.Tensor) -> None:
        raise torch.AcceleratorError("CUDA error: somebody else's")

    monkeypatch.setattr(trust, "_settle", settle)
    with pytest.raises(torch.AcceleratorError, match="somebody else's"):
        step(make(CASE, torch.float32))
    assert not lines() and not made_up.ran


@pytest.mark.parametrize("changed", [f.name for f in dataclasses.fields(Key)])
def test_another_key_is_judged_anew(changed: str, made_up: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inputs = make(CASE, torch.float32)
    made_up.fault = add("y")
    step(inputs)
    other = dataclasses.replace(GPU, **{changed: "another"})
    pretend(monkeypatch, tmp_path, other)
    made_up.fault = lambda results: None
    step(inputs)
    assert other.file() != GPU.file() and json.loads(other.file().read_text().splitlines()[0])["verdict"]["right"]
    assert other.file().parent.name == "fastlora"


def test_the_source_of_the_kernels_is_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = verdicts.source()
    for path in Path(tiles.__file__).parent.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(tiles, "__file__", str(tmp_path / "tiles.py"))
    assert verdicts.source.__wrapped__() == before
    (tmp_path / "dropout.py").write_text("changed")
    assert verdicts.source.__wrapped__() != before


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\nGCC version:  gcc 11.4.0\n",
            "535.183.01",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n", "570.86.15"),
    ],
)
def test_the_drivers_version_is_read(text: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    assert verdicts.driver() == version


def test_without_the_drivers_file_torch_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path, **_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 12080, raising=False)
    assert verdicts.driver() == "CUDA 12080"


def test_torn_and_foreign_lines_are_passed_over(made_up: Kernels) -> None:
    inputs = make(CASE, torch.float32)
    step(inputs)
    first, second = GPU.file().read_text().splitlines()
    foreign = json.dumps(json.loads(first) | {"key": {"gpu": "another"}, "verdict": {"right": False}})
    unknown = json.dumps(json.loads(first) | {"verdict": {"right": False, "by": "a later version"}})
    deep = "[" * 200_000
    GPU.file().write_text(f"{first}\n\n[1]\nnull\n{deep}\n{foreign}\n{unknown}\n{second[:50]}")
    new_process()
    step(inputs)
    assert made_up.ran == {"forward": 3, "backward": 4}, "forward is known, backward's line was torn"
    new_process()
    step(inputs)
    assert made_up.ran == {"forward": 4, "backward": 5}, "the new line did not hang on the torn one"


def test_of_two_processes_the_one_that_says_wrong_counts(made_up: Kernels) -> None:
    inputs = make(CASE, torch.float32)
    step(inputs)
    forward = GPU.file().read_text().splitlines()[0]
    wrong = json.dumps(json.loads(forward) | {"verdict": {"right": False, "worst": None, "what": "y"}})
    GPU.file().write_text(f"{wrong}\n{forward}\n")
    new_process()
    step(inputs)
    assert made_up.ran["forward"] == 2


def test_a_folder_that_cannot_be_written_is_told_once(
    made_up: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO, "fastlora"):
        for _ in range(2):
            step(make(CASE, torch.float32))
    assert made_up.ran == {"forward": 3, "backward": 3}, "judged once"
    assert sum("for this process only" in record.getMessage() for record in caplog.records) == 1 and not said(caplog)


def test_nothing_is_judged_while_a_graph_is_captured(made_up: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(CASE, torch.float32)
    with monkeypatch.context() as capture:
        capture.setattr(trust, "_capturing", lambda x: True)
        assert eager_serves(inputs) and not made_up.ran and not lines()
    step(inputs)
    new_process()
    monkeypatch.setattr(trust, "_capturing", lambda x: True)
    monkeypatch.setattr(trust, "_settle", lambda x: pytest.fail("a capture must not wait for the GPU"))
    ran = made_up.ran.copy()
    step(inputs)
    assert made_up.ran == {"forward": ran["forward"] + 1, "backward": ran["backward"] + 1}, "known: the kernels are captured"


def test_fake_tensors_are_no_verdict(made_up: Kernels) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        inputs = make(dataclasses.replace(CASE, shuffled_rows=False, dropout=0.0), torch.float32)
        assert isinstance(inputs.x, torch._subclasses.FakeTensor) and mode
        y, _ = trust.forward(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.case.spec, None, None)
        assert y.shape == (20, 48)
    assert not made_up.ran and not lines()
    # nor are they given to kernels that are known to be right
    real = make(dataclasses.replace(CASE, shuffled_rows=False, dropout=0.0), torch.float32)
    trust.forward(real.x, real.weight, real.bias, real.a, real.b, real.case.spec, None, None)
    ran = made_up.ran["forward"]
    with mode:
        trust.forward(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.case.spec, None, None)
    assert ran and made_up.ran["forward"] == ran


@pytest.mark.parametrize("fault", [None, add("da")], ids=["right", "wrong"])
def test_a_compiled_call_is_judged_too(fault: Fault | None, made_up: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    made_up.interpreted, made_up.fault = True, fault or made_up.fault
    inputs = make(dataclasses.replace(CASE, active=(True,)), torch.float32)

    def call(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, inputs.weight[:16], None, a, b, scale=1.0, dropout=0.25, seed=inputs.seed).sin().sum()

    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.a, inputs.b)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves), leaves)
    for ours, want in zip(got, torch.autograd.grad(call(*leaves), leaves), strict=True):
        assert torch.equal(ours, want)
    assert [one["verdict"]["right"] for one in lines()] == [True, fault is None]
    assert len(said(caplog)) == (fault is not None)


def test_what_was_measured_on_this_gpu_is_not_compared(made_up: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    point = tiles.Measured("Made-up 4000", 1600, 1.0, 2.0)
    row = tiles.row_of(tiles.Call(80, "half", 16, True))
    monkeypatch.setattr(tiles, "row_of", lambda call: dataclasses.replace(row, measured=(point,)))
    with monkeypatch.context() as patch:
        patch.setattr(trust, "judge", lambda *_: pytest.fail("judged"))
        step(make(CASE, torch.float32))
    assert made_up.ran == {"forward": 1, "backward": 1} and not lines()
    # measured on another GPU is not measured here
    monkeypatch.setattr(tiles, "row_of", lambda call: dataclasses.replace(row, measured=(point._replace(gpu="another"),)))
    new_process()
    step(make(CASE, torch.float32))
    assert len(lines()) == 2


def test_a_backend_that_was_asked_for_is_taken_as_it_is(made_up: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "_serve", lambda call: pytest.fail("judged"))
    for forced in ("triton", "eager"):
        step(make(CASE, torch.float32), forced=forced)
    assert not lines()


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 1)

    current, started = [0], []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index, self.before = device.index, current[0]

        def __enter__(self) -> None:
            current[0] = self.index

        def __exit__(self, *_: Any) -> None:
            current[0] = self.before

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda **_: started.append(current[0])

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    x = torch.zeros(2)
    for tensor, on in ((x.as_subclass(OnCuda), 1), (x, 0)):
        launch.launch(Kernel(), 1, tiles.Tile(16, 16, 16, 4, 1), seed_ptr=None, M=3, x_ptr=tensor)
        assert (started.pop(), current[0]) == (on, 0)


def test_info_shows_the_verdicts_of_each_gpu(made_up: Kernels, monkeypatch: pytest.MonkeyPatch, fastlora: Any) -> None:
    # other packages make torch count devices where it would ask for a driver
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "kernels on cuda" not in fastlora("info").out
    made_up.fault = add("db")
    step(make(CASE, torch.float32))
    found = SimpleNamespace(name="Made-up 4000", total_memory=2**34, major=8, minor=9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    out = " ".join(fastlora("info").out.split())
    assert "forward, 24→48, groups 0 2 of 3, float32" in out and "right: at most 0." in out
    assert "backward dx dA dB, 24→48" in out and "wrong, eager serves: db[0]: got" in out
    assert GPU.file().name in out.replace(" ", "")
