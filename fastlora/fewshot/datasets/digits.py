"""scikit-learn's handwritten digits: the data set of the demo, which needs no download."""

from __future__ import annotations

import numpy as np

from .base import Dataset, Item

__all__ = ["read"]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 64


def read() -> Dataset:
    """1797 digits of 8×8 pixels, enlarged once; the first half for shots, the second for the test."""
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    items = []
    for i, (pixels, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        large = small.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        items.append(Item(int(label), f"digit {i}", np.asarray(large)))
    half = len(items) // 2
    return Dataset("digits", NAMES, tuple(items[:half]), (), tuple(items[half:]), "a photo of the digit {}.", flip=False)
