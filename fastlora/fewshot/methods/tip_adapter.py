"""Tip-Adapter-F: zero-shot logits plus those of a cache of the shots, whose keys are trained.

    z(f) = scale · f Wᵀ + alpha · exp(-beta (1 - f Kᵀ)) V

f a unit image feature, W the class features, K (n, d) the shots' features, V (n, classes) their labels, one-hot.

As in Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022, arXiv 2111.03930: at
first K is the mean of ten random crops of each shot; AdamW trains it for 20 epochs with a cosine schedule. Each epoch takes one
of these ten crops, where the paper draws new ones. alpha and beta are 1 and 5.5, afterwards the best on the validation images,
if there are any.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..result import Result
from .frozen import Frozen

__all__ = ["fit", "logits", "search"]

ALPHA, BETA = 1.0, 5.5
VIEWS, EPOCHS, BATCH = 10, 20, 256
LR, EPS = 1e-3, 1e-4
# From a tenth of the paper's values up, in equal ratios: a base that knows few of the words needs a large alpha.
ALPHAS = tuple(ALPHA * 10 ** (-1 + 2.5 * i / 19) for i in range(20))
BETAS = tuple(BETA * 10 ** (-1 + 1.5 * i / 19) for i in range(20))


def logits(features: Tensor, given: Frozen, keys: Tensor, values: Tensor, alpha: float, beta: float) -> Tensor:
    """z of unit features (m, d): fp32 (m, classes)."""
    cache = torch.exp(-beta * (1 - features @ keys.T)) @ values
    return given.scale * features @ given.text.T + alpha * cache


def fit(given: Frozen) -> tuple[Result, dict[str, Any]]:
    """The predictions on the test set, and the alpha and beta that were used."""
    crops = given.views(VIEWS)
    labels = given.train[1].to(crops.device)
    values = F.one_hot(labels, len(given.classes)).float()
    keys = F.normalize(crops.mean(0), dim=-1).requires_grad_(True)
    optimizer = torch.optim.AdamW([keys], lr=LR, eps=EPS)
    steps = EPOCHS * math.ceil(len(labels) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(given.seed)
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(labels), generator=order).to(labels.device).split(BATCH):
            loss = F.cross_entropy(logits(crops[epoch % VIEWS, index], given, keys, values, ALPHA, BETA), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    trained = keys.detach()
    alpha, beta = search(given, trained, values)
    return Result.of(given.classes, given.test[1], logits(given.test[0], given, trained, values, alpha, beta)), {
        "tip_alpha": alpha,
        "tip_beta": beta,
    }


def search(given: Frozen, keys: Tensor, values: Tensor) -> tuple[float, float]:
    """The alpha and beta of the highest accuracy on the validation images, the first such; the paper's without images."""
    features, labels = given.val
    if not len(labels):
        return ALPHA, BETA
    labels = labels.to(features.device)
    best = (-1.0, ALPHA, BETA)
    for beta in BETAS:
        for alpha in ALPHAS:
            right = float((logits(features, given, keys, values, alpha, beta).argmax(-1) == labels).double().mean())
            best = max(best, (right, alpha, beta), key=lambda row: row[0])
    return best[1], best[2]
