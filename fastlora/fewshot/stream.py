"""Training images that do not fit into memory: worker processes decode and cut what the next steps take.

One loader runs over all steps that are left, so no worker is started twice, at the end of an epoch either. A worker gets the
number of a step and knows its draw, as everybody does; what it hands over equals what a store in memory would have.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batches import Draw, Draws, Inputs
from .crops import crop_on_cpu, crop_on_device, extent, pad
from .datasets import Item
from .errors import UserError
from .images import Unreadable, training_image
from .store import Store

__all__ = ["Stream"]

PREFETCH = 2  # steps that each worker keeps ready
MOST_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class _Steps(Dataset[Any]):
    """Step -> its pixels, or why there are none; what a worker runs.

    Args:
        items: the training images.
        max_side: as for `decode_training`.
        draws: which of them a step takes.
        size: side of the crops that are cut here; None to hand over whole images, padded to `room`.
        room: height and width of padded images.
    """

    items: Sequence[Item]
    max_side: int
    draws: Draws
    size: int | None
    room: tuple[int, int]

    def __getitem__(self, step: int) -> Tensor | str:
        draw = self.draws(step)
        own = int(draw.counts.sum())
        if not own:
            return torch.empty(0, dtype=torch.uint8)
        images = []
        for i in draw.index[:own].tolist():
            try:
                images.append(training_image(self.items[i], self.max_side)[0])
            except Unreadable as error:
                return f"{self.items[i].name} ({error})"
        pixels = pad(images, self.room) if self.size is None else crop_on_cpu(images, draw.boxes[:own], self.size)
        return pixels if own == len(draw.index) else pixels[torch.arange(len(draw.index)) % own]


class Stream(Store):
    """A store whose images stay on the disk. Steps are fetched in order, from the first that is asked for.

    Args:
        items: the training images.
        sizes: their heights and widths once decoded, int64 (N, 2).
        max_side: as for `decode_training`.
        size: side of the crops.
        device: of the model. For a CPU workers cut the crops; for a GPU they hand over images, which are cut there.
        workers: processes; None for one a core, at most 8.
    """

    def __init__(
        self, items: Sequence[Item], sizes: Tensor, max_side: int, size: int, device: torch.device, workers: int | None = None
    ) -> None:
        self.sizes, self._items, self._max_side, self._size, self._device = sizes, items, max_side, size, device
        self._cut_here = device.type != "cpu"
        self._room = extent(sizes)
        self.shape = (3, *self._room) if self._cut_here else (3, size, size)
        self.workers = workers or min(os.cpu_count() or 1, MOST_WORKERS)
        self._batches: Iterator[Tensor | str] | None = None

    def begin(self, draws: Draws, first: int, last: int) -> None:
        """Start the workers, for the steps first … last - 1."""
        work = _Steps(self._items, self._max_side, draws, None if self._cut_here else self._size, self._room)
        loader: DataLoader[Any] = DataLoader(
            work, sampler=range(first, last), batch_size=None, num_workers=self.workers, prefetch_factor=PREFETCH,
            pin_memory=self._device.type == "cuda", worker_init_fn=_deaf, multiprocessing_context=_context(),
        )  # fmt: skip
        with warnings.catch_warnings():
            # workers start by fork, from a process with threads: they use one thread and nothing of the parent's CUDA
            warnings.simplefilter("ignore", DeprecationWarning)
            self._batches = iter(loader)

    def fetch(self, draw: Draw) -> Tensor:
        """The pixels of the next step, whose draw this is.

        Raises:
            UserError: an image can no longer be read.
            RuntimeError: a worker was killed.
        """
        assert self._batches is not None, "begin comes first"
        pixels = next(self._batches)
        if isinstance(pixels, str):
            raise UserError(f"{pixels} cannot be read any more: put it back and go on with --resume")
        return pixels

    def crops(self, inputs: Inputs) -> Tensor:
        """uint8 or whole-numbered float32 crops (n, 3, size, size), on the device."""
        assert inputs.pixels is not None, "streamed images are sent"
        return crop_on_device(inputs.pixels, inputs.boxes, self._size) if self._cut_here else inputs.pixels

    def close(self) -> None:
        """End the workers."""
        self._batches = None  # the loader's iterator ends its workers when it goes


class _Flag:
    """An event that is only asked and set: no lock, which a worker that is killed while it asks would keep for ever."""

    def __init__(self) -> None:
        self._value = multiprocessing.RawValue(ctypes.c_bool, False)

    def is_set(self) -> bool:
        """Whether it was set."""
        return bool(self._value.value)

    def set(self) -> None:
        """Set it, for all processes."""
        self._value.value = True


def _context() -> Any:
    """How workers start: as torch's own do, but for the event."""
    context = copy.copy(multiprocessing.get_context())
    context.Event = _Flag  # type: ignore[method-assign,assignment]
    return context


def _deaf(worker: int) -> None:
    """A worker leaves signals to its parent, and ends when that tells it to, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
