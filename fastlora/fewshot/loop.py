"""The training loop: batches in a seeded order, an objective, AdamW, a cosine schedule; checkpoints, signals, the progress bar.

What a step sees, dropout included, is a function of (seed, step) and of the weights before it. So a resumed run takes the steps
an undisturbed one takes, bit for bit, and a checkpoint holds weights, moments and the step's number.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from ..encoders import cast_anew, frozen_in
from .batches import Draws, Feed, Inputs
from .distributed import ALONE, Ranks
from .engines import Engine, TrainStep, build, choose
from .errors import Interrupted, UserError
from .models import trained_state
from .objective import Objective, ZeroShotTerm
from .optimizer import Average, adamw, capturable
from .placement import TrainingSet
from .recipe import Recipe
from .runfolder import atomic
from .signals import Signals

__all__ = ["Loop", "load_checkpoint", "set_training_mode"]

READ_EVERY = 20
# Without a terminal there is no bar: a line is printed this often, in seconds.
LINE_EVERY = 30.0


class Loop:
    """Training of a patched (or fully trainable) model; holds all that a checkpoint holds.

    Args:
        model: requires_grad marks what is trained.
        recipe: the hyper-parameters.
        data: the training images and their classes.
        tokens: int64 (classes, length), the class prompts, on the device.
        dtype: what the towers compute in, or None for fp32.
        ranks: the processes that share the work.
        term: added to the loss, or None.
        engine: one of engines.ENGINES.
        microbatch: images at a time in the image tower, 0 for all; None for what is best on the device.
        say: is told in a line what does not go as it was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: TrainingSet,
        tokens: Tensor,
        dtype: torch.dtype | None,
        ranks: Ranks = ALONE,
        term: ZeroShotTerm | None = None,
        engine: str = "auto",
        microbatch: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.model, self.recipe, self.data, self.ranks = model, recipe, data, ranks
        self.device, self._say = tokens.device, say
        self.step = 0
        self.seconds = 0.0
        self.history = torch.zeros(recipe.steps, 2, dtype=torch.float32)  # loss and accuracy of each step, on the CPU
        set_training_mode(model, whole=recipe.method == "full")
        self.engine, why = choose(engine, model, self.device, ranks)
        if why:
            say(f"{why}: going on with {self.engine}")
        if dtype is not None and recipe.method != "full":
            for line in cast_anew(model):
                say(line)
        if microbatch and (dtype == torch.float16 or self.engine == "compile"):
            why = "--engine compile" if self.engine == "compile" else "fp16, whose loss is scaled whole"
            raise UserError(f"--microbatch {microbatch} does not go with {why}: leave one of them out")
        self.draws = Draws(recipe, data.store.sizes, data.flip, ranks, fill=self.engine != "eager")
        self._feed = Feed(self.draws.largest, data.store.shape, self.device)
        optimizer = adamw(model, recipe, self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        objective = Objective(model, tokens, dtype, ranks, term, recipe.share_prefix, microbatch)
        self._frozen_in = partial(frozen_in, dtype, model, *([] if term is None else [term.model]))
        rates = torch.tensor([recipe.lr_at(step) for step in range(recipe.steps)], dtype=torch.float32, device=self.device)
        self.average = Average(list(trained_state(model).values()), recipe.average, recipe.steps) if recipe.average else None
        self._step = TrainStep(objective, optimizer, scaler, data, rates, ranks, self.average)
        self._run: Engine | None = None
        self._told = 0  # steps whose loss and accuracy are in `history`, or under way to it
        self._under_way: tuple[slice, Tensor, torch.cuda.Event] | None = None

    @property
    def microbatch(self) -> int:
        """Images at a time in the image tower, for a batch of full size."""
        return self.draws.largest if self.engine == "compile" else self._step.objective.microbatch(self.draws.largest)

    def inputs(self, step: int) -> Inputs:
        """This rank's part of a step on the device, good until the next call; an epoch's last batch may be short."""
        draw = self.draws(step)
        # nothing of ours draws from torch's generators, but layers may that run alone, where the host's own method runs
        torch.default_generator.manual_seed(draw.seed)
        if self.device.type == "cuda":
            index = torch.cuda.current_device() if self.device.index is None else self.device.index
            torch.cuda.default_generators[index].manual_seed(draw.seed)
        return self._feed(draw, self.data.store.fetch(draw))

    def train_step(self) -> None:
        """One optimizer step; nothing is read back from the device."""
        if self._run is None:
            self.data.store.begin(self.draws, self.step, self.recipe.steps)
        inputs = self.inputs(self.step)
        if self._run is None:
            self.engine, self._run = build(self.engine, self._step, inputs, self._say)
        self._run(inputs)
        self.step += 1

    def read(self, wait: bool = True) -> tuple[float, float]:
        """Fetch loss and accuracy of the steps taken into `history`; their means over the last READ_EVERY that are there.

        Args:
            wait: for the device. If not, what is asked for now is there at the next call, which hardly waits.

        Raises:
            UserError: the loss is not a number.
        """
        self._arrive()
        new = slice(self._told, self.step)
        values = self.ranks.sum(self._step.history[new])
        self._told = self.step
        if self.device.type == "cuda":
            there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            there.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._under_way = new, there, copied
            if wait:
                self._arrive()
        else:
            self._note(new, values)
        known = self.step if self._under_way is None else self._under_way[0].start
        loss, accuracy = self.history[max(0, known - READ_EVERY) : known].mean(0).tolist() if known else (math.nan, math.nan)
        return loss, accuracy

    def _arrive(self) -> None:
        if self._under_way is not None:
            steps, values, copied = self._under_way
            copied.synchronize()
            self._under_way = None
            self._note(steps, values)

    def _note(self, steps: slice, values: Tensor) -> None:
        self.history[steps] = values
        if not values[:, 0].isfinite().all():
            raise UserError(f"the loss is not a number by step {steps.stop}: lower --lr, or use --precision fp32")

    def run(self, console: Console, signals: Signals, checkpoint: Path, every_seconds: float, every_steps: int | None,
            extra: dict[str, Any], log: Any) -> None:  # fmt: skip
        """Train to the last step, with checkpoints; `extra` goes into each of them, `log` is a SummaryWriter.

        Raises:
            Interrupted: a signal came; a checkpoint has been written.
            UserError: the loss is not a number, an image can no longer be read, a worker that decodes images was killed.
        """
        try:
            with self._frozen_in():
                self._train(console, signals, checkpoint, every_seconds, every_steps, extra, log)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):  # which torch's loader raises wherever the main thread is
                raise
            raise UserError(f"{' '.join(str(error).split())[:200]}: go on with --resume") from error
        finally:
            self._run = None  # a captured step reads the cast weights, which are gone
            self.data.store.close()

    def _train(self, console: Console, signals: Signals, checkpoint: Path, every_seconds: float, every_steps: int | None,
               extra: dict[str, Any], log: Any) -> None:  # fmt: skip
        steps, started_at = self.recipe.steps, self.step
        begun = last_save = last_line = time.monotonic()
        before = self.seconds
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[stats]}"),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        with signals.deferred(), Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=steps, completed=self.step, stats="")
            while self.step < steps:
                self.train_step()
                now = time.monotonic()
                self.seconds = before + now - begun
                due = bool(every_steps and self.step % every_steps == 0) or now - last_save > every_seconds
                stop = signals.received is not None
                if self.ranks.world > 1:  # all ranks save and stop at the same step, the first after a common look
                    look = self.step % READ_EVERY == 0
                    due, stop = (look and self.ranks.any(flag, self.device) for flag in (due, stop))
                if self.step % READ_EVERY == 0 or self.step == steps or due or stop:
                    loss, accuracy = self.read(wait=due or stop or self.step == steps)
                    stats = f"loss {loss:.3f}  accuracy {100 * accuracy:.1f} %"
                    stats += f"  {(self.step - started_at) / max(now - begun, 1e-9):.2f} steps/s"
                    progress.update(task, stats=stats)
                    log.add_scalar("train/loss", loss, self.step)
                    log.add_scalar("train/accuracy", 100 * accuracy, self.step)
                    log.add_scalar("train/lr", self.recipe.lr_at(self.step - 1), self.step)
                    if not console.is_terminal and (now - last_line > LINE_EVERY or self.step == steps):
                        console.print(f"step {self.step} of {steps}  {stats}")
                        last_line = now
                progress.update(task, completed=self.step)
                if due or stop or self.step == steps:
                    self.save(checkpoint, extra)
                    log.flush()
                    last_save = time.monotonic()
                if stop and self.step < steps:
                    where = f"step {self.step} of {steps} is saved in {checkpoint.parent}"
                    raise Interrupted(signals.received or signal.SIGTERM, f"stopped: {where}; {signals.how}")
        if signals.received is not None:
            raise Interrupted(signals.received, f"stopped after the last step, which is saved; {signals.how}")
        if self.average is not None:
            self.average.apply()

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """Write all that the next step depends on, whole or not at all."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "trained": {name: p.detach() for name, p in trained_state(self.model).items()},
            "optimizer": self._step.optimizer.state_dict(),
            "scaler": self._step.scaler.state_dict(),
            "average": None if self.average is None else self.average.mean,
            "extra": extra,
        }
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `save` wrote (as `load_checkpoint` reads it)."""
        parameters = trained_state(self.model)
        if set(parameters) != set(state["trained"]):
            raise UserError("the checkpoint is of another model: other parameters are trained")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["trained"][name])
        self._step.optimizer.load_state_dict(state["optimizer"])
        capturable(self._step.optimizer, self.device)
        self._step.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            torch._foreach_copy_(self.average.mean, [mean.to(self.device) for mean in state["average"]])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self._told = self.step
        self._step.counter.fill_(self.step)
        self._run = None  # a captured step would go on with the moments that were there before


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `Loop.save` wrote, on the CPU; tensors and plain values only, nothing is executed.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types on damaged files
        raise UserError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error


def set_training_mode(model: nn.Module, whole: bool = False) -> None:
    """Dropout of the adapters on; the frozen host stays in eval mode (BatchNorm's statistics are not ours to change).

    With `whole`, where all weights are trained, the host is in training mode too.
    """
    model.train(whole)
    for module in model.modules():
        if "lora_A" in module._parameters:
            module.training = True
