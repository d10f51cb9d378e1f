"""What the loops beside this file share: handwritten digits, and the mini CLIP as a module that gives its own loss."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastlora
from fastlora import mini

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Digits(Dataset[dict[str, Tensor]]):
    """The first `count` of scikit-learn's digits: pixel_values (3, 64, 64) and labels (), as Hugging Face calls them."""

    def __init__(self, count: int) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.tensor(images[:count], dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        self.images = F.interpolate(pixels, size=64, mode="bilinear").expand(-1, 3, -1, -1)
        self.labels = torch.tensor(labels[:count])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    """A CLIP that compares images with prompts; rank-4 adapters on q, k, v of both encoders are all that is trained."""

    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.clip, tokenizer = mini.load()
        print(fastlora.patch(self.clip, rank=4))
        self.register_buffer("tokens", tokenizer([f"a photo of the digit {word}." for word in WORDS]))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """pixel_values (B, 3, 64, 64), labels (B,) -> {"loss": (), "logits": (B, 10)}."""
        images = F.normalize(fastlora.encode_image(self.clip, pixel_values), dim=-1)
        texts = F.normalize(fastlora.encode_text(self.clip, self.tokens), dim=-1)
        logits = 100 * images @ texts.T
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def arguments() -> Any:
    """--steps, --batch and --out of every loop here."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("adapter.safetensors"))
    return parser.parse_args()
