"""Where the training images lie, as uint8, and how a step gets its crops of them.

    on a CPU                  each image at its own size; cut one by one, by torchvision's kernels
    on a GPU, if they fit     one padded tensor; picked and cut on the device, the host sends nothing but numbers
    else, pinned              one padded tensor in pinned memory; the host sends a step's images, cut on the device
    else, on the disk         stream.py: worker processes decode ahead what a step takes

Wherever they lie, a step gets the same crops.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from .batches import Draw, Draws, Inputs, Pixels
from .crops import crop_on_cpu, crop_on_device, pad

__all__ = ["OnCPU", "OnDevice", "Pinned", "Store"]


class Store(abc.ABC):
    """Training images and random crops of them.

    Args:
        sizes: height and width of each image, int64 (N, 2), on the CPU.
        shape: (3, h, w) of the pixels that the host sends for each image of a step; None if it sends none.
    """

    sizes: Tensor
    shape: tuple[int, int, int] | None

    def begin(self, draws: Draws, first: int, last: int) -> None:  # noqa: B027 - what is in memory is always ready
        """Get ready for the steps first … last - 1, which are fetched in this order."""

    @abc.abstractmethod
    def fetch(self, draw: Draw) -> Pixels:
        """What the host sends for a step."""

    @abc.abstractmethod
    def crops(self, inputs: Inputs) -> Tensor:
        """uint8 or whole-numbered float32 crops (n, 3, size, size), on the device; a function of `inputs` alone."""

    def close(self) -> None:  # noqa: B027 - nothing to let go of
        """Let go of what `fetch` needed."""


class OnCPU(Store):
    """Images (3, h, w) at their own sizes, for a model on the CPU."""

    def __init__(self, images: Sequence[Tensor], size: int) -> None:
        self.sizes, self.shape = sizes_of(images), (3, size, size)
        self._images, self._size = images, size

    def fetch(self, draw: Draw) -> Tensor | None:
        own = int(draw.counts.sum())
        if not own:
            return None
        crops = crop_on_cpu([self._images[i] for i in draw.index[:own].tolist()], draw.boxes[:own], self._size)
        return crops if own == len(draw.index) else crops[torch.arange(len(draw.index)) % own]

    def crops(self, inputs: Inputs) -> Tensor:
        assert inputs.pixels is not None, "a CPU's crops are sent"
        return inputs.pixels


class OnDevice(Store):
    """All images in one padded tensor on the device."""

    shape = None

    def __init__(self, images: Sequence[Tensor], size: int, device: torch.device) -> None:
        self.sizes, self._size = sizes_of(images), size
        self._images = pad(images, device=device)

    def fetch(self, draw: Draw) -> None: ...

    def crops(self, inputs: Inputs) -> Tensor:
        return crop_on_device(self._images[inputs.index], inputs.boxes, self._size)


class Pinned(Store):
    """All images in one padded tensor on the host, pinned where there is a GPU to send them to."""

    def __init__(self, images: Sequence[Tensor], size: int) -> None:
        self.sizes, self._size = sizes_of(images), size
        self._images = pad(images, pinned=torch.cuda.is_available())
        _, channels, height, width = self._images.shape
        self.shape = (channels, height, width)

    def fetch(self, draw: Draw) -> list[Tensor]:
        return [self._images[i] for i in draw.index.tolist()]

    def crops(self, inputs: Inputs) -> Tensor:
        assert inputs.pixels is not None, "pinned images are sent"
        return crop_on_device(inputs.pixels, inputs.boxes, self._size)


def sizes_of(images: Sequence[Tensor]) -> Tensor:
    """Height and width of images (3, h, w), int64 (N, 2)."""
    return torch.tensor([image.shape[1:] for image in images]).view(-1, 2)
