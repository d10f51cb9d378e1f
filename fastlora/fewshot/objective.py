"""The loss of a training step: cross-entropy on temperature × cosine(image, class prompt)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders import ImageEncoder, TextEncoder
from .distributed import Ranks
from .evaluate import autocast, class_logits

__all__ = ["Batch", "Objective"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    Args:
        images: normalised crops, fp32 (n, 3, s, s).
        labels: int64 (n,).
        ids: int64 (n,), the place of each image in the whole batch; keys its dropout masks.
        size: images in the whole batch.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    size: int


class Objective:
    """Loss and right answers of a batch under a model; nothing in it reads from the device.

    Args:
        model: patched or fully trainable.
        tokens: int64 (classes, length), the class prompts, on the device.
        dtype: of autocast, or None for fp32.
        ranks: the processes that share the work.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, dtype: torch.dtype | None, ranks: Ranks) -> None:
        self.model, self.dtype, self.ranks = model, dtype, ranks
        self.classes, self.device = len(tokens), tokens.device
        # looks the towers up once, packs the prompts once, and computes what no adapter touches once
        self._images = ImageEncoder(model)
        mine = ranks.shard(len(tokens))
        self._prompts = TextEncoder(model, tokens[mine], ids=torch.arange(len(tokens))[mine])

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's share of the mean loss and of the right answers of a batch, fp32, both on the device."""
        # drawn by every rank at every step, whatever its part of the batch, so that all go on drawing the same
        text_seed, image_seed = torch.randint(2**63 - 1, (2,), device=self.device)
        with autocast(self.device, self.dtype):
            text = self._prompts(text_seed)
            # a rank may get nothing of an epoch's last, short batch
            image = self._images(batch.images, image_seed, ids=batch.ids) if len(batch.ids) else text[:0]
            text, image = (F.normalize(features.float(), dim=-1) for features in (text, image))
            text = self.ranks.gather(text, self.classes)
        logits = class_logits(self.model, image, text)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum") / batch.size
        return loss, (logits.argmax(1) == batch.labels).sum() / batch.size
