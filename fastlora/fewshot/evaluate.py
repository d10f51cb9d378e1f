"""Features and predictions: zero-shot and adapted accuracy, and a linear probe on frozen features."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..encoders import encode_image, encode_text
from .crops import Normalise
from .images import EvalImages, bar
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
    "probe",
]

BATCH = 128
# Logistic regression's C is chosen from these by validation images, else by cross-validation on the shots.
PROBE_CS = tuple(float(c) for c in 10.0 ** np.arange(-2, 5))


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
        return torch.empty(0, 1, device=device), torch.empty(0, dtype=torch.int64)
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
    logits = class_logits(model, features, text) if len(labels) else torch.empty(0, len(exam.classes))
    return Result.of(exam.classes, labels, logits)


def probe(
    classes: tuple[str, ...], train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], seed: int
) -> tuple[Result, float]:
    """Logistic regression (scikit-learn) on frozen unit features; each argument is (features (n, d), labels (n,)).

    Returns:
        The predictions on the test set, and the C that was chosen.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    def model(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=2000, random_state=seed)

    (x, y), (val_x, val_y), (test_x, test_y) = ((a.cpu().double().numpy(), b.numpy()) for a, b in (train, val, test))
    folds = min(5, int(np.bincount(y)[np.unique(y)].min()))
    if len(val_y):
        scores = [model(c).fit(x, y).score(val_x, val_y) for c in PROBE_CS]
    elif folds >= 2:
        splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
        scores = [float(cross_val_score(model(c), x, y, cv=splits).mean()) for c in PROBE_CS]
    else:  # one shot and nothing to choose by: the middle
        scores = [float(c == PROBE_CS[len(PROBE_CS) // 2]) for c in PROBE_CS]
    c = PROBE_CS[int(np.argmax(scores))]
    fitted = model(c).fit(x, y)
    # a class without a shot is never predicted
    logits = torch.full((len(test_y), len(classes)), -torch.inf)
    if len(test_y):
        logits[:, fitted.classes_] = torch.from_numpy(fitted.predict_log_proba(test_x)).float()
    return Result.of(classes, test[1], logits), c
