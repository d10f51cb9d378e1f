"""A step through its engines: the same results, nothing read from the device, nothing left behind by a warm-up."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.fewshot import devices, engines, trainer
from fastlora.fewshot.batches import Draws, Feed, filled
from fastlora.fewshot.distributed import ALONE, Ranks
from fastlora.fewshot.engines import build, choose, graphed, untouched
from fastlora.fewshot.loop import Loop
from fastlora.fewshot.recipe import Recipe
from loops import CPU, STEPS, loop, losses, weights
from models import tiny


def replayed(**options: Any) -> Loop:
    """A loop whose step is made ready as for a CUDA graph and then called again and again, on the CPU."""
    made = loop(fill=True, **options)
    made._run = graphed(made._step, made.inputs(made.step), lambda step: step)
    return made


class TestGraphForm:
    """All of a captured step but the capture: static tensors, filled batches, a warm-up that leaves no trace."""

    @pytest.mark.parametrize("options", [{}, {"average": 0.5, "lr_ratio": 4.0}, {"on_device": False}], ids=str)
    def test_bit_for_bit_the_eager_engine(self, options: dict[str, Any]) -> None:
        eager, other = loop(fill=True, **options), replayed(**options)
        assert torch.equal(losses(eager), losses(other))
        ours, theirs = weights(other), weights(eager)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert eager.history[-1, 0] != eager.history[0, 0]
        if eager.average is not None and other.average is not None:
            assert all(map(torch.equal, other.average.mean, eager.average.mean))

    def test_goes_on_from_a_checkpoint(self, tmp_path: Any) -> None:
        from fastlora.fewshot.loop import load_checkpoint

        whole, first = losses(loop(fill=True)), replayed()
        losses(first, 3)
        first.save(tmp_path / "c", {})
        second = loop(fill=True)
        second.restore(load_checkpoint(tmp_path / "c"))
        second._run = graphed(second._step, second.inputs(3), lambda step: step)
        losses(second, STEPS - 3)
        assert torch.equal(second.history, whole)

    def test_fewer_steps_are_left_than_the_warm_up_takes(self) -> None:
        """A whole run of one step, and the last one of a run that was resumed: on a GPU an index too far loses the context."""
        assert torch.equal(losses(replayed(iterations=1), 1), losses(loop(fill=True, iterations=1), 1))
        whole, resumed = losses(loop(fill=True)), loop(fill=True)
        losses(resumed, STEPS - 1)
        resumed._run = graphed(resumed._step, resumed.inputs(STEPS - 1), lambda step: step)
        assert torch.equal(losses(resumed, 1), whole[-1:])

    def test_a_step_reads_the_same_tensors_every_time(self) -> None:
        made = loop(fill=True)
        seen = [made.inputs(step) for step in range(4)]
        assert {one.rows.data_ptr() for one in seen} == {seen[0].rows.data_ptr()}
        assert {one.rows.shape for one in seen} == {seen[0].rows.shape}
        other = replayed()
        with pytest.raises(AssertionError, match="captured with"):
            assert other._run is not None
            other._run(dataclasses.replace(seen[0], rows=seen[0].rows.clone()))

    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
    def test_warm_up_leaves_no_trace(self, scaled: bool) -> None:
        made = loop(fill=True, average=0.9)
        step = made._step
        step.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0, growth_interval=1)
        inputs = made.inputs(0)
        before = [(tensor, tensor.detach().clone()) for tensor in step.tensors()]
        scale, draws = step.scaler.state_dict(), torch.get_rng_state()
        with untouched(step):
            for _ in range(3):
                step(inputs)
            torch.rand(1)
            assert not any(torch.equal(tensor, value) for tensor, value in before)
        assert all(torch.equal(tensor, value) for tensor, value in before) and torch.equal(torch.get_rng_state(), draws)
        moments = [value for state in step.optimizer.state.values() for value in state.values()]
        assert moments and not any(value.any() for value in moments)
        assert step.scaler.state_dict() == scale and all(p.grad is None for p in step.parameters)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device, or copies from the host to it behind its back."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if any(name.startswith(wait) for wait in self.WAITS) or name == "lift_fresh":
            self.found.append(name)
        return function(*args, **(kwargs or {}))


class TestNoReads:
    @pytest.mark.parametrize("options", [{}, {"average": 0.5}, {"method": "full"}], ids=str)
    def test_a_step_reads_nothing_from_the_device(self, options: dict[str, Any]) -> None:
        made = loop(fill=True, **options)
        inputs = made.inputs(0)
        made._step(inputs)  # what is computed once, at first use
        with Reads() as reads:
            made._step(inputs)
        assert reads.found == []

    def test_the_counter_counts(self) -> None:
        with Reads() as reads:
            float(torch.ones(()) + 1)
            torch.tensor([1.0])
        assert len(reads.found) == 2

    def test_loss_and_accuracy_are_read_late(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = loop()
        reads: list[int] = []
        monkeypatch.setattr(made, "_note", lambda steps, values: reads.append(made.step))
        for _ in range(STEPS):
            made.train_step()
        assert reads == []
        made.read()
        assert reads == [STEPS]


class TestShortBatches:
    def test_filled_up_they_count_as_much(self) -> None:
        """The last batch of an epoch has one image; two repeats of weight zero change sums' order, nothing else."""
        short, full = loop(), loop(fill=True)
        torch.testing.assert_close(losses(full), losses(short), rtol=1e-5, atol=1e-6)
        ours, theirs = weights(full), weights(short)
        for name, tensor in theirs.items():
            # AdamW divides by the gradient's size: rounding shows where gradients are near zero
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

    def test_gradients_of_one_step_are_those_of_its_own_images(self) -> None:
        gradients = []
        for fill in (False, True):
            made = loop(fill=fill)
            loss, _ = made._step.loss(made.inputs(2))  # one image of three
            loss.backward()
            gradients.append({name: p.grad for name, p in made.model.named_parameters() if p.grad is not None})
        assert any(g.abs().max() > 1e-4 for g in gradients[0].values())
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)

    def test_repeats_follow_the_images_in_turn(self) -> None:
        sizes = torch.tensor([[9, 9]]).expand(8, 2)
        draw = Draws(Recipe(batch_size=6), sizes, True)(1)
        again = filled(draw, 6)
        assert again.index.tolist() == [*draw.index.tolist() * 3] and again.counts.tolist() == [True] * 2 + [False] * 4
        assert torch.equal(again.boxes.box[2:4], draw.boxes.box) and again.ids.tolist() == list(range(6))
        assert again.size == draw.size == 2 and filled(draw, 2) is draw


class TestDraws:
    def test_ranks_share_a_batch(self) -> None:
        sizes = torch.tensor([[20, 30]]).expand(11, 2)
        recipe = Recipe(batch_size=4)
        for step in range(6):
            whole = Draws(recipe, sizes, True)(step)
            parts = [Draws(recipe, sizes, True, Ranks(rank, 3))(step) for rank in range(3)]
            assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
            assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
            assert torch.equal(torch.cat([part.boxes.box for part in parts]), whole.boxes.box)
            assert {part.seed for part in parts} == {whole.seed} and {part.size for part in parts} == {whole.size}

    def test_an_epoch_takes_every_image_once(self) -> None:
        draws = Draws(Recipe(batch_size=4), torch.tensor([[20, 30]]).expand(11, 2), True)
        epochs = [torch.cat([draws(3 * epoch + step).index for step in range(3)]) for epoch in range(2)]
        assert all(sorted(epoch.tolist()) == list(range(11)) for epoch in epochs) and not torch.equal(*epochs)

    def test_the_feed_carries_a_draw_unchanged(self) -> None:
        draw = filled(Draws(Recipe(batch_size=4), torch.tensor([[20, 30]]).expand(6, 2), True)(1), 4)
        inputs = Feed(4, None, CPU)(draw, None)
        for got, want in (
            (inputs.index, draw.index), (inputs.ids, draw.ids), (inputs.counts, draw.counts),
            (inputs.boxes.box, draw.boxes.box), (inputs.boxes.flip, draw.boxes.flip),
        ):  # fmt: skip
            assert torch.equal(got, want)
        assert (int(inputs.size), int(inputs.seed)) == (draw.size, draw.seed)


class TestChoice:
    def test_without_a_gpu_graph_is_eager_and_says_so(self) -> None:
        assert choose("graph", tiny(), CPU, ALONE) == ("eager", "engine graph needs a CUDA device, the model is on cpu")
        assert choose("auto", tiny(), CPU, ALONE) == ("eager", "")
        assert choose("auto", tiny(), torch.device("cuda"), ALONE) == ("graph", "")

    def test_several_processes_run_eager(self) -> None:
        for name in ("compile", "graph"):
            engine, why = choose(name, tiny(), torch.device("cuda"), Ranks(0, 2))
            assert engine == "eager" and "these are 2" in why

    def test_patches_dropped_by_the_host_are_not_captured(self) -> None:
        model = tiny(vision_cfg={"patch_dropout": 0.5}).train()
        engine, why = choose("graph", model, torch.device("cuda"), ALONE)
        assert engine == "eager" and "visual.patch_dropout" in why
        assert choose("graph", model.eval(), torch.device("cuda"), ALONE) == ("graph", "")

    @pytest.mark.parametrize("name", ["compile", "graph"])
    def test_what_fails_goes_on_eagerly_with_the_reason(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no compiler\nanywhere")

        monkeypatch.setattr(torch, "compile", fails)
        monkeypatch.setattr(engines, "capture", fails)
        made, said = loop(fill=True), []
        used, engine = build(name, made._step, made.inputs(0), said.append)
        made._run = engine
        assert used == "eager" and said == [f"engine {name} failed (no compiler anywhere): going on with eager"]
        assert torch.equal(losses(made), losses(loop(fill=True)))


class TestCompile:
    @pytest.mark.filterwarnings("default")  # the compiler warns of what it does itself
    def test_follows_the_eager_engine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Traced and differentiated ahead of time, without inductor's C++: seconds instead of minutes."""
        compile_: Callable[..., Any] = torch.compile
        calls: list[Any] = []

        def traced(function: Any, **options: Any) -> Any:
            calls.append(options)
            return compile_(function, backend="aot_eager", **options)

        monkeypatch.setattr(torch, "compile", traced)
        made = loop(engine="compile")
        torch.testing.assert_close(losses(made), losses(loop()), rtol=1e-5, atol=1e-6)
        assert made.engine == "compile" and calls == [{"dynamic": False}]


def test_a_run_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Streams, events and captures of torch are made on the current device, whatever the tensors are on."""
    entered: list[torch.device] = []

    @contextlib.contextmanager
    def device(of: torch.device) -> Iterator[None]:
        entered.append(of)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: entered == [torch.device("cuda", 1)])
    monkeypatch.setattr(trainer, "choose_device", torch.device)
    monkeypatch.setattr(trainer, "_run", lambda job, folder, device, *_: {"current": list(entered), "given": device})
    done = trainer.run(trainer.Job(Recipe(), "digits", tmp_path / "run", device="cuda:1"), Console(quiet=True))
    assert done == {"current": [torch.device("cuda", 1)], "given": torch.device("cuda", 1)} and not entered
    assert devices.choose_dtype("auto", torch.device("cuda", 1)) == torch.bfloat16
