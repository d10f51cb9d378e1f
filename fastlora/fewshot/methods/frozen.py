"""What a method on frozen features is given: unit features of the drawn images and of the class prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..crops import Normalise, crop_on_cpu, draw_boxes
from ..evaluate import BATCH, autocast, encode_images
from ..recipe import Recipe

__all__ = ["Frozen", "views"]


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Unit features, fp32 (n, d), and labels, int64 (n,), of one run. Features lie on the model's device, labels on the CPU.

    Args:
        classes: class names.
        train, val, test: of the centre crops; `val` may be empty.
        text: of the classes, (classes, d).
        scale: the model's temperature.
        views: number -> features (number, n, d) of that many random crops of each training image.
        seed: of the run.
    """

    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    text: Tensor
    scale: float
    views: Callable[[int], Tensor]
    seed: int


@torch.no_grad()
def views(
    model: nn.Module, images: Sequence[Tensor], recipe: Recipe, size: int, flip: bool, normalise: Normalise,
    dtype: torch.dtype | None, number: int,
) -> Tensor:  # fmt: skip
    """Unit features, fp32 (number, n, d), of random crops of uint8 images (3, h, w), drawn as for training."""
    sizes = torch.tensor([image.shape[1:] for image in images])
    draws = torch.Generator().manual_seed(recipe.seed)
    device = normalise.factor.device
    rows = []
    for _ in range(number):
        boxes = draw_boxes(sizes, recipe.crop_scale, flip, draws)
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            crops = normalise(crop_on_cpu(images[part], boxes[part], size))
            with autocast(device, dtype):
                rows.append(encode_images(model, crops))
    return torch.cat(rows).view(number, len(images), -1)
