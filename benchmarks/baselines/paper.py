"""The arithmetic of CLIP-LoRA's own code (Zanella & Ben Ayed, arXiv 2405.18541), written from its description.

A dense ΔW = B A is built for each projection and applied as a second dense product; q, k, v are three projections with three
masks; all prompts are tokenised and encoded at 77 tokens in every step; the causal mask is a float tensor, which rules flash
attention out; loss and accuracy are read in every step; autocast fp16 with a GradScaler on a GPU (over fp16 weights, as the
original loads), fp32 on a CPU. The original's data loading is left out: every contestant gets its batch on the device.

Captured in a CUDA graph, which the original never is, the step reads nothing: the sums of loss and accuracy stay on the device,
and the tokens are made once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.model import convert_weights_to_lp
from torch import Tensor, nn

from .common import Adapters, Job, SeparateTrainee


class DenseLinear(nn.Module):
    """A frozen linear (N, K) and scale · B A as a second dense (N, K) product."""

    def __init__(self, linear: nn.Linear, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        self.lora_A, self.lora_B = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return self.linear(x) + F.linear(self.dropout(x), self.lora_B @ self.lora_A) * self.scale


class Paper(SeparateTrainee):
    """One step as the paper's code takes it."""

    name = "the paper's arithmetic"
    half = torch.float16
    capturing = False
    cast_once = False  # convert_weights_to_lp does it, as the original's loader

    def __init__(self, job: Job, adapters: Adapters) -> None:
        super().__init__(job, adapters)
        self.scaler = torch.amp.GradScaler(job.device, enabled=self.compute_dtype == torch.float16)
        self.seen = self.correct = self.total = 0.0
        self.sums = torch.zeros(2, device=job.device)

    def install(self, adapters: Adapters) -> None:
        if self.compute_dtype == torch.float16:
            convert_weights_to_lp(self.model, torch.float16)
        super().install(adapters)

    def adapted(self, linear: nn.Linear, a: Tensor, b: Tensor) -> nn.Module:
        return DenseLinear(linear, a, b, self.job.scale, self.job.dropout)

    def text_features(self, first: int = 0, last: int | None = None) -> Tensor:
        tokens = self.tokens[first:last] if self.capturing else self.tokenize(self.prompts[first:last]).to(self.job.device)
        with self.autocast():
            return self.model.encode_text(tokens)

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            text, image = (F.normalize(f, dim=-1) for f in (self.text_features(), self.image_features(images)))
            return 100.0 * image @ text.T

    def step(self, images: Tensor, labels: Tensor) -> None:
        logits = self.logits(images)
        loss = F.cross_entropy(logits, labels)
        self.correct += (logits.argmax(1) == labels).sum().item()
        self.total += loss.item() * len(labels)
        self.seen += len(labels)
        self._update(loss)

    def captured_step(self, images: Tensor, labels: Tensor) -> None:
        self.capturing = True
        logits = self.logits(images)
        loss = F.cross_entropy(logits, labels)
        self.sums += torch.stack([(logits.argmax(1) == labels).sum().float(), loss.detach().float() * len(labels)])
        self._update(loss)
        self.capturing = False

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
