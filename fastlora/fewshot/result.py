"""What a model says of a test set, and what follows from it: accuracies, confusions, calibration."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["BINS", "Bin", "Result"]

BINS = 15  # as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, arXiv 1706.04599


@dataclasses.dataclass(frozen=True)
class Bin:
    """Images whose confidence lies in (low, high]: how many, mean confidence and accuracy in percent (None without images)."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclasses.dataclass(frozen=True)
class Result:
    """Predictions on a test set of n images.

    Args:
        classes: class names.
        labels, predicted: int64 (n,).
        confidence: fp32 (n,), the probability of the predicted class.
        truth: fp32 (n,), the probability of the true class.
        rank: int64 (n,), how many classes are more probable than the true one.
    """

    classes: tuple[str, ...]
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    truth: Tensor
    rank: Tensor

    @classmethod
    def of(cls, classes: tuple[str, ...], labels: Tensor, logits: Tensor) -> Result:
        """What logits (n, classes) of any device say; labels int64 (n,)."""
        logits = logits.float()
        own = logits.gather(1, labels.to(logits.device)[:, None])
        probabilities = logits.softmax(-1)
        predicted = logits.argmax(-1) if len(logits) else labels.to(logits.device)
        confidence = probabilities.gather(1, predicted[:, None])[:, 0]
        truth = probabilities.gather(1, labels.to(logits.device)[:, None])[:, 0]
        rank = (logits > own).sum(-1)
        return cls(classes, labels, predicted.cpu(), confidence.cpu(), truth.cpu(), rank.cpu())

    def tensors(self) -> dict[str, Tensor]:
        """All but the class names: what a checkpoint keeps."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "classes"]
        return {name: getattr(self, name) for name in names}

    @property
    def accuracy(self) -> float:
        """Share of images whose class is predicted, in percent; 0 without images."""
        return 100 * float((self.labels == self.predicted).double().mean()) if len(self.labels) else 0.0

    def top(self, k: int) -> float:
        """Share of images whose class is among the k most probable, in percent; 0 without images."""
        return 100 * float((self.rank < k).double().mean()) if len(self.labels) else 0.0

    def confusion(self) -> Tensor:
        """int64 (classes, classes): row the true class, column the predicted one."""
        n = len(self.classes)
        return torch.bincount(self.labels * n + self.predicted, minlength=n * n).view(n, n)

    def per_class(self) -> list[tuple[str, int, float | None]]:
        """(name, test images, accuracy in percent or None without images) of every class."""
        counts = self.confusion()
        rows = zip(self.classes, counts.sum(1).tolist(), counts.diagonal().tolist(), strict=True)
        return [(name, total, 100 * hits / total if total else None) for name, total, hits in rows]

    @property
    def mean_of_classes(self) -> float:
        """The mean of the classes' accuracies, in percent, over those with images; 0 without any."""
        known = [accuracy for _, _, accuracy in self.per_class() if accuracy is not None]
        return sum(known) / len(known) if known else 0.0

    def most_confused(self, most: int = 20) -> list[tuple[str, str, int]]:
        """(true class, predicted class, images) of the commonest mistakes."""
        counts = self.confusion().fill_diagonal_(0).flatten()
        top = counts.topk(min(most, len(counts)))
        n = len(self.classes)
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [(self.classes[i // n], self.classes[i % n], count) for i, count in pairs if count]

    def mistakes(self) -> Tensor:
        """int64, which images are mistaken, those of the highest confidence first."""
        wrong = (self.labels != self.predicted).nonzero()[:, 0]
        return wrong[self.confidence[wrong].argsort(descending=True, stable=True)]

    def bins(self) -> list[Bin]:
        """BINS bins of confidence, each as wide as the others: the reliability diagram."""
        which = (self.confidence.double() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
        right = self.labels == self.predicted
        rows = []
        for i in range(BINS):
            inside = which == i
            count = int(inside.sum())
            confidence = 100 * float(self.confidence[inside].double().mean()) if count else None
            accuracy = 100 * float(right[inside].double().mean()) if count else None
            rows.append(Bin(i / BINS, (i + 1) / BINS, count, confidence, accuracy))
        return rows

    @property
    def calibration_error(self) -> float:
        """ECE in percent: the mean distance of confidence and accuracy of the bins, weighted by their images; 0 without any."""
        gaps = [
            b.images * abs(b.confidence - b.accuracy)
            for b in self.bins()
            if b.confidence is not None and b.accuracy is not None
        ]
        return sum(gaps) / max(1, len(self.labels))

    def write_csv(self, path: Path, names: list[str]) -> None:
        """One line an image: file, class, predicted class, its probability, the true class's probability and rank from 1."""
        columns: list[Any] = [self.labels, self.predicted, self.confidence, self.truth, self.rank]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("image", "class", "predicted", "probability", "class_probability", "class_rank"))
            for name, label, guess, p, truth, rank in zip(names, *(column.tolist() for column in columns), strict=True):
                writer.writerow((name, self.classes[label], self.classes[guess], f"{p:.4f}", f"{truth:.4f}", rank + 1))
