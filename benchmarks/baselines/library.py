"""fastlora on the same host: patched, and its towers run without wasted tokens where the library does that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlora
from fastlora.encoders import ImageEncoder, TextEncoder, microbatched

from .common import Adapters, Compiled, Trainee, cut, gather


class Patched(Trainee):
    """`fastlora.patch` alone: the host's own encode methods, as in somebody's own training loop."""

    name = "fastlora, host's encoders"

    def install(self, adapters: Adapters) -> None:
        job = self.job
        fastlora.patch(self.model, rank=job.rank, alpha=1.0, dropout=job.dropout)
        with torch.no_grad():
            for key, mine in cut(self.model, lambda p: p).items():
                for target, value in zip(mine, adapters[key], strict=True):
                    target.copy_(value)

    def gradients(self) -> dict[str, Tensor]:
        return gather(cut(self.model, lambda p: p.grad))


class FastLoRA(Patched):
    """`fastlora.patch` and its encoders."""

    name, packs = "fastlora", True
    share_prefix = False
    in_parts = True  # images some at a time, where the library does that

    def install(self, adapters: Adapters) -> None:
        super().install(adapters)
        self.images = ImageEncoder(self.model)

    def read(self, texts: list[str]) -> None:
        super().read(texts)
        self.text = TextEncoder(self.model, self.tokens, share_prefix=self.share_prefix)

    def image_features(self, images: Tensor) -> Tensor:
        return self.images(images.to(self.compute_dtype))

    def text_features(self, first: int = 0, last: int | None = None) -> Tensor:
        assert (first, last) == (0, None), "all prompts are packed together"
        return self.text()

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        count = len(images)
        size = self.images.microbatch(count, images.device) if self.in_parts else count
        if size >= count:
            return super().loss(images, labels)
        seed, ids = torch.randint(2**62, ()), torch.arange(count)

        def part(text: Tensor, rows: slice) -> Tensor:
            image = self.images(images[rows], seed, normalize=True, ids=ids[rows])
            return F.cross_entropy(100.0 * image @ text.T, labels[rows], reduction="sum") / count

        text = F.normalize(self.text_features(), dim=-1)
        return microbatched(part, count, size, text, self.trained())


class SharedPrefix(FastLoRA):
    """The first tokens that all prompts share are computed once; with dropout the prompts share their masks."""

    name, share_prefix = "fastlora, share_prefix", True


class CompiledFastLoRA(Compiled, FastLoRA):
    """Both encoders by torch.compile."""

    name, in_parts = "fastlora, compiled", False
