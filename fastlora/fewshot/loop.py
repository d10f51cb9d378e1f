"""The training loop: batches in a seeded order, an objective, AdamW, a cosine schedule, checkpoints.

What a step sees is a function of (seed, step): the order of an epoch of (seed, epoch), its crops of (seed, step). Only dropout
draws from torch's own generator, whose state the checkpoint keeps. So a resumed run takes the steps an undisturbed one takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from .crops import Cropper, draw_boxes
from .distributed import ALONE, Ranks
from .errors import Interrupted, UserError
from .models import trained_state
from .objective import Batch, Objective, ZeroShotTerm
from .optimizer import Average, parameter_groups
from .recipe import Recipe
from .runfolder import atomic

__all__ = ["Loop", "Signals", "generator"]

READ_EVERY = 20
# Without a terminal there is no bar: a line is printed this often, in seconds.
LINE_EVERY = 30.0


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator for one purpose ("order", "crops") and one epoch or step of a run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    # torch's CPU generator keeps 32 bits of a seed
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


class Signals(contextlib.AbstractContextManager["Signals"]):
    """SIGTERM and SIGINT as Interrupted: at once, or, inside `deferred`, when the loop looks (a second one: at once).

    Args:
        how: how to go on, for the message.
    """

    def __init__(self, how: str) -> None:
        self.how = how
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block look at `received` itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and self.received is None:
            self.received = number
        else:
            raise Interrupted(number, f"stopped; {self.how}")


class Loop:
    """Training of a patched (or fully trainable) model; holds all that a checkpoint holds.

    Args:
        model: requires_grad marks what is trained.
        recipe: the hyper-parameters.
        cropper: the training images.
        labels: int64 (n,), their classes.
        tokens: int64 (classes, length), the class prompts, on the device.
        dtype: of autocast, or None for fp32.
        flip: whether images are mirrored.
        ranks: the processes that share the work.
        term: added to the loss, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        cropper: Cropper,
        labels: Tensor,
        tokens: Tensor,
        dtype: torch.dtype | None,
        flip: bool,
        ranks: Ranks = ALONE,
        term: ZeroShotTerm | None = None,
    ) -> None:
        self.model, self.recipe, self.cropper, self.ranks = model, recipe, cropper, ranks
        self.flip, self.device = flip, tokens.device
        self.labels = labels.to(self.device)
        self.step = 0
        self.seconds = 0.0
        self.history = torch.zeros(recipe.steps, 2)  # loss and accuracy of each step, on the CPU
        self._recent = torch.zeros(READ_EVERY, 2, device=self.device)
        self._order: tuple[int, Tensor] | None = None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, recipe),
            lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.objective = Objective(model, tokens, dtype, ranks, term)
        self.average = None
        if recipe.average:
            first = recipe.steps - max(1, round(recipe.average * recipe.steps)) + 1
            self.average = Average(list(trained_state(model).values()), first)

    def batch(self, step: int) -> Batch:
        """This rank's part of a step's batch; the last one of an epoch may be short."""
        n, size = len(self.labels), self.recipe.batch_size
        epoch, at = divmod(step, -(-n // size))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(n, generator=generator(self.recipe.seed, "order", epoch))
        index = self._order[1][at * size : (at + 1) * size]
        draws = generator(self.recipe.seed, "crops", step)
        boxes = draw_boxes(self.cropper.sizes[index], self.recipe.crop_scale, self.flip, draws)
        mine = self.ranks.shard(len(index))
        part = index[mine]
        images = self.cropper(part, boxes[mine]) if len(part) else torch.empty(0, device=self.device)
        labels = self.labels[part.to(self.device, non_blocking=True)]
        return Batch(images, labels, torch.arange(len(index))[mine], len(index))

    def train_step(self) -> None:
        """One optimizer step; nothing is read back from the device."""
        loss, accuracy = self.objective(self.batch(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.ranks.sum_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["ratio"] * self.recipe.lr_at(self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._recent[self.step % READ_EVERY] = torch.stack([loss.detach(), accuracy])
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def read(self) -> tuple[float, float]:
        """Fetch loss and accuracy of the steps since the last read into `history`; their means over the last READ_EVERY.

        Raises:
            UserError: the loss is not a number.
        """
        start = (self.step - 1) // READ_EVERY * READ_EVERY
        self.history[start : self.step] = self.ranks.sum(self._recent[: self.step - start]).cpu()
        if not self.history[start : self.step, 0].isfinite().all():
            raise UserError(f"the loss is not a number by step {self.step}: lower --lr, or use --precision fp32")
        loss, accuracy = self.history[max(0, self.step - READ_EVERY) : self.step].mean(0).tolist()
        return loss, accuracy

    def run(self, console: Console, signals: Signals, checkpoint: Path, every_seconds: float, every_steps: int | None,
            extra: dict[str, Any], log: Any) -> None:  # fmt: skip
        """Train to the last step, with checkpoints; `extra` goes into each of them, `log` is a SummaryWriter.

        Raises:
            Interrupted: a signal came; a checkpoint has been written.
        """
        set_training_mode(self.model, whole=self.recipe.method == "full")
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
                    loss, accuracy = self.read()
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
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.mean,
            "cpu_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            torch._foreach_copy_(self.average.mean, [mean.to(self.device) for mean in state["average"]])
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        first = self.step // READ_EVERY * READ_EVERY
        self._recent[: self.step - first] = self.history[first : self.step].to(self.device)
        torch.set_rng_state(state["cpu_generator"])
        if state["cuda_generators"]:
            torch.cuda.set_rng_state_all(state["cuda_generators"])


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
