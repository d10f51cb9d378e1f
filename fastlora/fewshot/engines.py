"""How a training step is carried out: as it is written, compiled, or captured once in a CUDA graph and replayed.

A step is one function of Inputs (batches.py): crops, both encoders, loss, backward, the schedule, AdamW, and the note of loss
and accuracy. It reads and writes tensors at fixed addresses and leaves nothing on the host, so all engines run the same one:

    eager      as it is written
    compile    crops, encoders and loss by torch.compile, the rest as it is written
    graph      the whole of it in one CUDA graph: one launch a step
    auto       graph where it can be had, else eager
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .batches import Inputs
from .distributed import Ranks
from .objective import Batch, Objective
from .optimizer import Average
from .placement import TrainingSet

__all__ = ["ENGINES", "Engine", "TrainStep", "build", "choose", "graphed", "untouched"]

ENGINES = ("auto", "eager", "compile", "graph")
WARM_UP = 3  # steps before a capture: what libraries set up at first use must not be captured
Engine = Callable[[Inputs], None]


class TrainStep:
    """One optimizer step. Its tensors stay where they are from the first step to the last.

    Args:
        objective: loss and right answers of a Batch.
        optimizer: as `adamw` makes it.
        scaler: of the loss, enabled for fp16.
        data: the training images and their classes.
        rates: fp32 (steps,), the learning rate of each step, on the device.
        ranks: the processes that share the work.
        average: takes in the weights after each step, or None.
    """

    def __init__(
        self, objective: Objective, optimizer: torch.optim.AdamW, scaler: torch.amp.GradScaler, data: TrainingSet,
        rates: Tensor, ranks: Ranks, average: Average | None = None,
    ) -> None:  # fmt: skip
        self.objective, self.optimizer, self.scaler, self.data = objective, optimizer, scaler, data
        self.rates, self.ranks, self.average = rates, ranks, average
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.counter = torch.zeros(1, dtype=torch.int64, device=rates.device)
        self.history = torch.zeros(
            len(rates), 2, dtype=torch.float32, device=rates.device
        )  # this rank's share of loss and right answers
        self.loss: Callable[[Inputs], tuple[Tensor, Tensor]] = self._loss

    def batch(self, inputs: Inputs) -> Batch:
        """What the objective takes."""
        images = self.data.normalise(self.data.store.crops(inputs))
        return Batch(images, self.data.labels[inputs.index], inputs.ids, inputs.counts, inputs.size, inputs.seed)

    def _loss(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self.objective(self.batch(inputs))

    def __call__(self, inputs: Inputs) -> None:
        loss, hits = self.loss(inputs)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.ranks.sum_gradients(self.parameters)
        rate = self.rates.index_select(0, self.counter)[0]
        for group in self.optimizer.param_groups:
            torch.mul(rate, group["ratio"], out=group["lr"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.counter)
        self.history.index_copy_(0, self.counter, torch.stack([loss.detach(), hits])[None])
        self.counter += 1

    def tensors(self) -> list[Tensor]:
        """All that a step writes to and the next one reads, as far as it exists; GradScaler keeps its own."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        mean = [] if self.average is None else self.average.mean
        return [*self.parameters, *moments, *mean, self.counter, self.history]


def choose(name: str, model: nn.Module, device: torch.device, ranks: Ranks) -> tuple[str, str]:
    """The engine that `name`, one of ENGINES, comes to here, and why not the one that was asked for ("" if it is that)."""
    if name == "eager":
        return name, ""
    why = _obstacle("compile" if name == "compile" else "graph", model, device, ranks)
    return ("eager", "" if name == "auto" else why) if why else ("graph" if name == "auto" else name, "")


def _obstacle(name: str, model: nn.Module, device: torch.device, ranks: Ranks) -> str:
    if ranks.world > 1:
        return f"engine {name} is for one process, these are {ranks.world}: their messages are not captured"
    if name == "graph" and device.type != "cuda":
        return f"engine graph needs a CUDA device, the model is on {device.type}"
    for path, module in model.named_modules():
        # its draws are the host's, so a replay would drop the same patches again
        if type(module).__name__ == "PatchDropout" and module.training and module.prob > 0:
            return f"engine {name} cannot draw which patches {path} drops, which happens on the host"
    return ""


def build(name: str, step: TrainStep, inputs: Inputs, say: Callable[[str], None]) -> tuple[str, Engine]:
    """Engine `name` as `choose` gave it, ready for the first inputs without a step taken; eager, saying why, if it fails."""
    try:
        if name == "graph":
            return name, graphed(step, inputs, capture)
        if name == "compile":
            return name, compiled(step, inputs)
    except Exception as error:  # torch raises many types, from anywhere in compilers and drivers
        step.loss = step._loss
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        say(f"engine {name} failed ({reason}): going on with eager")
    return "eager", step


def compiled(step: TrainStep, inputs: Inputs) -> Engine:
    """`step` with its loss compiled; two steps are tried, as the second finds what the first computed once and kept."""
    step.loss = torch.compile(step._loss, dynamic=False)
    with untouched(step):
        _try(step, inputs, 2)
    return step


def graphed(step: TrainStep, inputs: Inputs, capture: Callable[[Callable[[], None]], Callable[[], None]]) -> Engine:
    """`step` on `inputs` as `capture` makes it repeatable: an engine that always reads the tensors of these inputs.

    Args:
        capture: function -> a function that does the same again; torch's CUDA graphs, or the identity.
    """
    with untouched(step):
        _warm_up(step, inputs)
    replay = capture(lambda: step(inputs))

    def engine(again: Inputs) -> None:
        same = again.rows.data_ptr() == inputs.rows.data_ptr() and again.rows.shape == inputs.rows.shape
        assert same, "a captured step reads the tensors that it was captured with"
        replay()

    return engine


def _try(step: TrainStep, inputs: Inputs, times: int) -> None:
    """Take a run's first step so many times: a run may have fewer steps, and an index beyond them loses the GPU."""
    for _ in range(times):
        step.counter.zero_()
        step(inputs)


def _warm_up(step: TrainStep, inputs: Inputs) -> None:
    if inputs.rows.device.type != "cuda":
        _try(step, inputs, WARM_UP)
        return
    side = torch.cuda.Stream(inputs.rows.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _try(step, inputs, WARM_UP)
    torch.cuda.current_stream().wait_stream(side)


def capture(function: Callable[[], None]) -> Callable[[], None]:
    """`function` as one CUDA graph. Other threads (pinning a loader's batches) may go on calling CUDA meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay


@contextlib.contextmanager
def untouched(step: TrainStep) -> Iterator[None]:
    """Within, steps may be taken; then weights, moments, scaler, counter, history and generators are as before, in place."""
    before = [(tensor, tensor.detach().clone()) for tensor in step.tensors()]
    scaler = step.scaler.state_dict()
    device = step.rates.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            with torch.no_grad():
                known = set()
                for tensor, value in before:
                    tensor.copy_(value)
                    known.add(id(tensor))
                for tensor in step.tensors():
                    if id(tensor) not in known:  # AdamW's moments and step counts, which begin at zero
                        tensor.zero_()
            step.optimizer.zero_grad(set_to_none=True)
            step.scaler.load_state_dict(scaler)
