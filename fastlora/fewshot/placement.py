"""Which store the training images go to, and how much memory they take there, said before it is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import Tensor

from .crops import Normalise, extent
from .datasets import Item
from .errors import UserError
from .images import Decoded, available_memory, gib
from .models import LoadedModel
from .store import OnCPU, OnDevice, Pinned, Store
from .stream import Stream

__all__ = ["TrainingSet", "training_set"]

# Of a GPU's free memory the training images may take this share; towers and their activations need the rest.
GPU_SHARE = 0.4


@dataclasses.dataclass(frozen=True)
class TrainingSet:
    """What is trained on.

    Args:
        store: the images.
        labels: int64 (N,), their classes, on the device of the model.
        normalise: makes of crops what the image tower takes.
        flip: whether half of the crops are mirrored.
    """

    store: Store
    labels: Tensor
    normalise: Normalise
    flip: bool


def training_set(
    items: Sequence[Item], decoded: Decoded, max_side: int, model: LoadedModel, device: torch.device, flip: bool,
    console: Console,
) -> TrainingSet:  # fmt: skip
    """Decoded images where `device` gets them fastest; says how much memory they take before it is taken.

    Args:
        items: the training images.
        decoded: what `decode_training` made of them; those whose pixels were not kept are streamed from the disk.
        max_side: as for `decode_training`.
        model: says what its inputs look like.

    Raises:
        UserError: a GPU's images fit neither its memory nor the host's.
    """
    sizes = torch.tensor([decoded.sizes[item.name] for item in items])
    store: Store
    if all(item.name in decoded.images for item in items):
        store = _in_memory([decoded.images[item.name] for item in items], sizes, model.size, device, console)
    else:
        store = Stream(items, sizes, max_side, model.size, device)
        console.print(f"{store.workers} processes decode {len(items)} training images anew at each step")
    labels = torch.tensor([item.label for item in items]).to(device)
    return TrainingSet(store, labels, Normalise(model.mean, model.std, device), flip)


def _in_memory(images: Sequence[Tensor], sizes: Tensor, size: int, device: torch.device, console: Console) -> Store:
    if device.type == "cpu":
        return OnCPU(images, size)
    height, width = extent(sizes)
    needed, what = 3 * len(images) * height * width, f"{len(images)} training images, padded to {height} x {width}"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if needed <= GPU_SHARE * free:
        console.print(f"keeping {what}, on the GPU: {gib(needed)} of {gib(free)} free")
        return OnDevice(images, size, device)
    host = available_memory()
    if needed > host:
        raise UserError(f"{what}, take {gib(needed)}, but {gib(host)} of memory is free: use --images stream")
    console.print(f"keeping {what}, in pinned memory: {gib(needed)} of {gib(host)}; on the GPU {gib(free)} are free")
    return Pinned(images, size)
