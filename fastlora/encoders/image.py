"""Images to features: `encode_image` for one call, `ImageEncoder` for a training loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Step, run_block
from .packing import Sequences
from .towers import VisionTower, in_place, seed_for, vision_tower

__all__ = ["ImageEncoder", "encode_image"]

# Numbers of x in a microbatch on a CPU, 800 rows of a ViT-B: products of fewer are slower, more fill the memory.
_ENOUGH = 800 * 768


def encode_image(
    model: Any,
    images: Tensor,
    *,
    normalize: bool = False,
    seed: int | Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """`model.encode_image(images)` with the last block for the class token alone, where that alone becomes the feature.

    Equal to the host's own method in values and gradients, to rounding, with dropout on as well.

    Args:
        model: an open_clip CLIP, CustomTextCLIP or CoCa, patched or not.
        images: (B, 3, H, W), as for the host.
        normalize: whether features get length 1.
        seed: int or int64 tensor of one element that keys the dropout masks; None draws one from torch's generator. Where the
            host's own method runs (`plan` says where), each layer draws its own.
        ids: (B,) integers, the identity of each image, default 0 … B-1: with the same seed an image with the same identity has
            the same masks in whatever batch, so ranks that share a seed give each image its place in the global batch.

    Returns:
        (B, E).

    Raises:
        TypeError: a model of another family.
        ValueError: ids of another shape.
    """
    return ImageEncoder(model)(images, seed, normalize=normalize, ids=ids)


class ImageEncoder:
    """`encode_image` with the tower looked up once. Patching, merging, train() and hooks may follow later."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._found = vision_tower(model)

    @property
    def _tower(self) -> VisionTower | None:
        """The tower, None where the host's own method must run now."""
        return in_place(self._found, self.model)

    def microbatch(self, count: int, device: torch.device) -> int:
        """How many of `count` images are best encoded at a time in training: some on a CPU, all on a GPU.

        All as well where the host's own method runs: its images may depend on each other, as BatchNorm's do.
        """
        if device.type != "cpu" or (tower := self._tower) is None:
            return count
        parts = max(1, round(count * tower.host.positional_embedding.numel() / _ENOUGH))
        return -(-count // parts)

    def __call__(
        self, images: Tensor, seed: int | Tensor | None = None, *, normalize: bool = False, ids: Tensor | None = None
    ) -> Tensor:
        """Features (B, E) of images (B, 3, H, W). Arguments as for `encode_image`."""
        if ids is not None and (ids.shape != images.shape[:1] or ids.dtype.is_floating_point):
            raise ValueError(f"ids must be ({len(images)},) integers, got {ids.dtype} {tuple(ids.shape)}")
        tower = self._tower
        if tower is None or len(images) == 0:
            return self.model.encode_image(images, normalize=normalize)
        x = tower.embed(images)
        count, length, width = x.shape
        x = x.reshape(count * length, width)
        first = torch.arange(count, device=x.device) * length
        rows = None
        if ids is not None:
            rows = (ids.to(x.device)[:, None] * length + torch.arange(length, device=x.device)).flatten()
        step = Step(seed_for(tower.blocks, seed, x.device), rows, tower.host.transformer.grad_checkpointing)
        sequences = Sequences(((count, length),), causal=False)
        for block in tower.blocks[:-1]:
            x = run_block(block, x, sequences, step)
        x = run_block(tower.blocks[-1], x, sequences, step, first if tower.pooled else None)
        features = tower.head(x if tower.pooled else x.view(count, length, width))
        return F.normalize(features, dim=-1) if normalize else features
