"""Features and predictions: every test image is told apart by the words of its classes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..encoders import encode_image, encode_text
from ..progress import bar
from .crops import Normalise
from .images import EvalImages
from .result import Result

__all__ = [
    "Exam",
    "Result",
    "autocast",
    "class_logits",
    "encode_images",
    "encode_prompts",
    "evaluate",
    "image_features",
]

BATCH = 128


def encode_prompts(model: Any, tokens: Tensor) -> Tensor:
    """Class prompts, int64 (classes, length) or (classes, templates, length), to unit features, fp32 (classes, d)."""
    return class_features(encode_text(model, tokens.flatten(0, -2)), len(tokens))


def class_features(features: Tensor, classes: int) -> Tensor:
    """Features (classes · templates, d), class by class, to those of the classes, fp32 (classes, d): unit features, of several
    templates their mean at unit length."""
    unit = F.normalize(features.float(), dim=-1)
    return unit if len(unit) == classes else F.normalize(unit.view(classes, -1, unit.shape[-1]).mean(1), dim=-1)


def encode_images(model: Any, images: Tensor) -> Tensor:
    """Normalised images (n, 3, s, s) to unit features, fp32 (n, d)."""
    return F.normalize(encode_image(model, images).float(), dim=-1)


def class_logits(model: Any, image: Tensor, text: Tensor) -> Tensor:
    """The model's own temperature (100 for OpenAI's CLIP) × cosine: fp32 (n, classes)."""
    with torch.autocast(image.device.type, enabled=False):
        return model.logit_scale.detach().float().exp() * image @ text.T


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision in `dtype`, or nothing for None (fp32)."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@dataclasses.dataclass(frozen=True)
class Exam:
    """A test: images, and the words that they are told apart by.

    Args:
        name: what it is called: "test", "new classes", or another data set.
        classes: class names; the labels of `images` index them.
        images: the test images.
        tokens: int64 (classes, templates, length), the class prompts, on the model's device.
    """

    name: str
    classes: tuple[str, ...]
    images: EvalImages
    tokens: Tensor


@torch.no_grad()
def image_features(
    model: nn.Module, test: EvalImages, normalise: Normalise, dtype: torch.dtype | None, console: Console, what: str
) -> tuple[Tensor, Tensor]:
    """Unit features of all test images, fp32 (n, d), on the model's device, and their labels, int64 (n,), on the CPU."""
    features, labels = [], []
    device = normalise.factor.device
    with bar(console) as progress:
        task = progress.add_task(what, total=len(test.items))
        for pixels, label in test.batches(BATCH):
            with autocast(device, dtype):
                features.append(encode_images(model, normalise(pixels)))
            labels.append(label)
            progress.advance(task, len(label))
    if not features:
        return torch.empty(0, 1, dtype=torch.float32, device=device), torch.empty(0, dtype=torch.int64)
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    exam: Exam,
    normalise: Normalise,
    dtype: torch.dtype | None,
    console: Console,
    what: str = "testing",
) -> Result:
    """Classify every test image by the closest class prompt; the model is put in eval mode."""
    model.eval()
    features, labels = image_features(model, exam.images, normalise, dtype, console, what)
    with autocast(exam.tokens.device, dtype):
        text = encode_prompts(model, exam.tokens)
    logits = class_logits(model, features, text) if len(labels) else torch.empty(0, len(exam.classes), dtype=torch.float32)
    return Result.of(exam.classes, labels, logits)
