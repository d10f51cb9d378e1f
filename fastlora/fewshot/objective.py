"""The loss of a training step: cross-entropy on temperature × cosine(image, class prompt), and what may be added to it."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders import ImageEncoder, TextEncoder, common_prefix, microbatched
from .distributed import Ranks
from .evaluate import autocast, class_features, class_logits, encode_images

__all__ = ["Batch", "Objective", "ZeroShotTerm", "frozen_twin"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """One rank's part of a batch.

    Args:
        images: normalised crops, fp32 (n, 3, s, s).
        labels: int64 (n,).
        ids: int64 (n,), the place of each image in the whole batch; keys its dropout masks.
        counts: bool (n,), False for repeats that only fill a short batch up.
        size: int64 (), images in the whole batch that count.
        seed: int64 (), keys the dropout of the step, the same on all ranks.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    counts: Tensor
    size: Tensor
    seed: Tensor

    def part(self, rows: slice) -> Batch:
        """Some of the images; `size` stays that of the whole batch."""
        some = {name: getattr(self, name)[rows] for name in ("images", "labels", "ids", "counts")}
        return dataclasses.replace(self, **some)


@dataclasses.dataclass(frozen=True)
class ZeroShotTerm:
    """lambda T² KL(softmax(z₀ / T) ‖ softmax(z / T)): what adapted logits z lose of the zero-shot z₀ of the same crops.

    T² keeps the size of its gradient, as Hinton et al. do for distillation (arXiv 1503.02531).

    Args:
        model: the model as it was, see `frozen_twin`.
        text: its class features, fp32 (classes, d).
        weight: lambda.
        temperature: T.
    """

    model: nn.Module
    text: Tensor
    weight: float
    temperature: float

    @torch.no_grad()
    def targets(self, images: Tensor) -> Tensor:
        """Logarithms of softmax(z₀ / T) of normalised crops, fp32 (n, classes); the caller sets autocast."""
        zero_shot = class_logits(self.model, encode_images(self.model, images), self.text)
        return (zero_shot / self.temperature).log_softmax(-1)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The term of each image, fp32 (n,)."""
        adapted = (logits / self.temperature).log_softmax(-1)
        divergence = F.kl_div(adapted, targets, reduction="none", log_target=True).sum(-1)
        return self.weight * self.temperature**2 * divergence


def frozen_twin(model: nn.Module, share: bool) -> nn.Module:
    """A copy of an unpatched `model` that stays as it is now; with `share` it has the same tensors, which must not change."""
    tensors: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())} if share else {}
    twin = copy.deepcopy(model, tensors).eval()
    return twin if share else twin.requires_grad_(False)


class Objective:
    """Loss and right answers of a batch under a model; nothing in it reads from the device.

    Args:
        model: patched or fully trainable.
        tokens: int64 (classes, length) or (classes, templates, length), the class prompts, on the device.
        dtype: of autocast, or None for fp32.
        ranks: the processes that share the work.
        term: added to the cross-entropy, or None.
        share_prefix: compute the first tokens that all prompts have in common once.
        microbatch: images at a time in the image tower, 0 for all; None for what is best on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        dtype: torch.dtype | None,
        ranks: Ranks,
        term: ZeroShotTerm | None = None,
        share_prefix: bool = False,
        microbatch: int | None = None,
    ) -> None:
        self.model, self.dtype, self.ranks, self.term, self._asked = model, dtype, ranks, term, microbatch
        self.classes, self.device = len(tokens), tokens.device
        # looks the towers up once, packs the prompts once, and computes what no adapter touches once
        self._images = ImageEncoder(model)
        mine = ranks.shard(len(tokens))
        prompts = tokens[mine].flatten(0, -2)
        self._mine = mine.stop - mine.start
        first = mine.start * (len(prompts) // self._mine)
        # of all prompts, not of this rank's: what is shared decides which rows have one mask
        prefix = common_prefix(model, tokens.flatten(0, -2)) if share_prefix else 0
        ids = torch.arange(first, first + len(prompts))
        self._prompts = TextEncoder(model, prompts, ids=ids, share_prefix=prefix)

    def microbatch(self, count: int) -> int:
        """How many of `count` images are computed at a time."""
        # GradScaler must scale a loss before it is differentiated, torch.compile differentiates the whole of it
        if self.dtype == torch.float16 or torch.compiler.is_compiling():
            return count
        return self._images.microbatch(count, self.device) if self._asked is None else self._asked or count

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """This rank's share of the mean loss and of the right answers of a batch, fp32, both on the device."""
        with autocast(self.device, self.dtype):
            text = self.ranks.gather(class_features(self._prompts(batch.seed), self._mine), self.classes)
        count = len(batch.ids)
        size = self.microbatch(count)
        if size >= count:  # a rank may get nothing of an epoch's last, short batch
            return self._share(batch, text)
        right: list[Tensor] = []

        def loss(text: Tensor, rows: slice) -> Tensor:
            part, hits = self._share(batch.part(rows), text)
            right.append(hits)
            return part

        return microbatched(loss, count, size, text, self.model.parameters()), torch.stack(right).sum()

    def _share(self, batch: Batch, text: Tensor) -> tuple[Tensor, Tensor]:
        """What these images add to both, given the class features (classes, d)."""
        with autocast(self.device, self.dtype):
            image = self._images(batch.images, batch.seed, ids=batch.ids) if len(batch.ids) else text[:0]
            image = F.normalize(image.float(), dim=-1)
            targets = self.term.targets(batch.images) if self.term is not None and len(batch.ids) else None
        logits = class_logits(self.model, image, text)
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        if self.term is not None and targets is not None:
            losses = losses + self.term(logits, targets)
        right = logits.argmax(1) == batch.labels
        return (losses * batch.counts).sum() / batch.size, (right & batch.counts).sum() / batch.size
