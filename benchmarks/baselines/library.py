"""fastlora on the same host: patched, and its towers run without wasted tokens where the library does that."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import fastlora
from fastlora.encoders import ImageEncoder, TextEncoder

from .common import Adapters, Trainee, blocks, gather


class FastLoRA(Trainee):
    """`fastlora.patch` and its encoders."""

    name = "fastlora"

    def install(self, adapters: Adapters) -> None:
        job = self.job
        fastlora.patch(self.model, rank=job.rank, alpha=1.0, dropout=job.dropout)
        with torch.no_grad():
            for key, mine in self._pairs(lambda p: p).items():
                for target, value in zip(mine, adapters[key], strict=True):
                    target.copy_(value)
        self.images = ImageEncoder(self.model)

    def read(self, texts: list[str]) -> None:
        super().read(texts)
        self.text = TextEncoder(self.model, self.tokens)

    def _pairs(self, of: Callable[[Tensor], Tensor | None]) -> Adapters:
        """(A, B) of each projection, cut out of what `of` gives for the packed parameters."""
        pairs: Adapters = {}
        for tower, rows in blocks(self.model).items():
            for block, row in enumerate(rows):
                a, b = of(row.attn.lora_A), of(row.attn.lora_B)
                assert a is not None and b is not None, f"{tower} block {block} got no gradient"
                for projection, pair in enumerate(zip(a, b.chunk(3), strict=True)):
                    pairs[tower, block, projection] = pair
        return pairs

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.images(images.to(self.compute_dtype)), self.text()

    def gradients(self) -> dict[str, Tensor]:
        return gather(self._pairs(lambda p: p.grad))
