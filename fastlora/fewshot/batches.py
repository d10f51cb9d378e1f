"""What a step takes: images, their crops, its dropout seeds; a pure function of (seed, step), on whichever machine.

    Draws(step) -> Draw on the host -> Feed -> Inputs: tensors of fixed shape and address on the device

All that changes from step to step is in Inputs, so a step that was captured once can be replayed. Nothing here waits for the
device, except that a step is not begun before the one `SLOTS` earlier has its inputs: work that is queued stays bounded, and so
does the time until a signal is served.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .crops import Boxes, draw_boxes
from .distributed import ALONE, Ranks
from .recipe import Recipe

__all__ = ["Draw", "Draws", "Feed", "Inputs", "Pixels", "generator"]

SLOTS = 3
# What an image of a step is told by: number, place in the whole batch, whether it counts, top, left, height, width, flip.
COLUMNS = 8
# What a host sends of a step's images: one tensor, one tensor an image, or nothing, where the device has them all.
Pixels = Tensor | Sequence[Tensor] | None


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A seed for one purpose ("order", "crops", "dropout") and one epoch or step of a run."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # 63 bits


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator from `derived_seed`, of which it keeps 32 bits."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index) & 0xFFFFFFFF)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


@dataclasses.dataclass(frozen=True)
class Draw:
    """One rank's part of a step, on the host.

    Args:
        index: int64 (n,), which training images.
        boxes: n crops.
        ids: int64 (n,), the place of each image in the whole batch; keys its dropout masks.
        counts: bool (n,), False for repeats that only fill the batch up.
        size: images in the whole batch, over all ranks.
        seed: of the step's dropout, the same on all ranks.
    """

    index: Tensor
    boxes: Boxes
    ids: Tensor
    counts: Tensor
    size: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Draws:
    """Step -> Draw: every epoch takes each image once, in an order of its own; its last batch may be short.

    Args:
        recipe: seed, batch size and crops.
        sizes: height and width of each training image, int64 (N, 2).
        flip: whether half of the images are mirrored.
        ranks: the processes that share each batch.
        fill: repeat images of a short batch, with weight zero, until it has the size of the others.
    """

    recipe: Recipe
    sizes: Tensor
    flip: bool
    ranks: Ranks = ALONE
    fill: bool = False

    @property
    def largest(self) -> int:
        """Images of one rank in one step, at most."""
        shard = self.ranks.shard(min(self.recipe.batch_size, len(self.sizes)))
        return shard.stop - shard.start

    def __call__(self, step: int) -> Draw:
        n, size, seed = len(self.sizes), self.recipe.batch_size, self.recipe.seed
        epoch, at = divmod(step, -(-n // size))
        index = _order(seed, epoch, n)[at * size : (at + 1) * size]
        boxes = draw_boxes(self.sizes[index], self.recipe.crop_scale, self.flip, generator(seed, "crops", step))
        mine = self.ranks.shard(len(index))
        ids = torch.arange(len(index))[mine]
        draw = Draw(
            index[mine], boxes[mine], ids, torch.ones(len(ids), dtype=torch.bool), len(index),
            derived_seed(seed, "dropout", step),
        )  # fmt: skip
        return filled(draw, self.largest) if self.fill else draw


def filled(draw: Draw, n: int) -> Draw:
    """`draw` with n images: its own, then the same again from the first, which do not count."""
    own = len(draw.index)
    if own == n:
        return draw
    again = torch.arange(n) % own
    boxes = Boxes(draw.boxes.box[again], draw.boxes.flip[again])
    return Draw(draw.index[again], boxes, torch.arange(n), torch.arange(n) < own, draw.size, draw.seed)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A step's Draw on the device; a captured step reads these tensors, and nothing else that changes between steps.

    Args:
        numbers: int64 (2,): images in the whole batch, seed.
        rows: int64 (n, COLUMNS): what each image is told by.
        pixels: uint8 (n, 3, h, w), what the host sends; None where the device has all images.
    """

    numbers: Tensor
    rows: Tensor
    pixels: Tensor | None

    @property
    def size(self) -> Tensor:
        """Images in the whole batch, int64 ()."""
        return self.numbers[0]

    @property
    def seed(self) -> Tensor:
        """Of the step's dropout, int64 ()."""
        return self.numbers[1]

    @property
    def index(self) -> Tensor:
        """Which training images, int64 (n,)."""
        return self.rows[:, 0]

    @property
    def ids(self) -> Tensor:
        """Their places in the whole batch, int64 (n,)."""
        return self.rows[:, 1]

    @property
    def counts(self) -> Tensor:
        """Which of them count, bool (n,)."""
        return self.rows[:, 2] != 0

    @property
    def boxes(self) -> Boxes:
        """Their crops."""
        return Boxes(self.rows[:, 3:7], self.rows[:, 7] != 0)


class Feed:
    """Brings draws to the device: always into the same tensors, through pinned buffers that are used in turn.

    Args:
        n: images of a step, at most.
        shape: (3, h, w) of the pixels that the host sends for each image, or None.
        device: where to.
    """

    def __init__(self, n: int, shape: tuple[int, int, int] | None, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        slots = SLOTS if self._cuda else 1
        self._host = torch.zeros(slots, 2 + n * COLUMNS, dtype=torch.int64, pin_memory=self._cuda)
        self._there = torch.zeros(2 + n * COLUMNS, dtype=torch.int64, device=device)
        self._pixels = None if shape is None else torch.zeros(n, *shape, dtype=torch.uint8, device=device)
        self._copied: list[torch.cuda.Event | None] = [None] * slots
        self._next = 0

    def __call__(self, draw: Draw, pixels: Pixels) -> Inputs:
        """The draw as tensors on the device, good until the next call."""
        n = len(draw.index)
        slot, self._next = self._next, (self._next + 1) % len(self._copied)
        if (copied := self._copied[slot]) is not None:
            copied.synchronize()
        host = self._host[slot, : 2 + n * COLUMNS]
        host[0], host[1] = draw.size, draw.seed
        rows = host[2:].view(n, COLUMNS)
        rows[:, 0], rows[:, 1], rows[:, 2] = draw.index, draw.ids, draw.counts
        rows[:, 3:7], rows[:, 7] = draw.boxes.box, draw.boxes.flip
        there = self._there[: 2 + n * COLUMNS]
        there.copy_(host, non_blocking=True)
        images = None if self._pixels is None else self._pixels[:n]
        if images is not None and pixels is not None:
            for row, image in zip(images, pixels, strict=True) if not isinstance(pixels, Tensor) else [(images, pixels)]:
                row.copy_(image, non_blocking=True)
        if self._cuda:
            self._copied[slot] = torch.cuda.Event()
            self._copied[slot].record()  # type: ignore[union-attr]
        return Inputs(there[:2], there[2:].view(n, COLUMNS), images)
