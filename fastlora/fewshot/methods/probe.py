"""Linear probe: logistic regression (scikit-learn) on frozen unit features."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..result import Result
from .frozen import Frozen

__all__ = ["fit"]

# C is chosen from these by validation images, else by cross-validation on the shots.
CS = tuple(float(c) for c in 10.0 ** np.arange(-2, 5))


def fit(given: Frozen) -> tuple[Result, dict[str, Any]]:
    """The predictions on the test set, and the C that was chosen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    def model(c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=2000, random_state=given.seed)

    parts = given.train, given.val, given.test
    (x, y), (val_x, val_y), (test_x, test_y) = ((a.cpu().double().numpy(), b.numpy()) for a, b in parts)
    folds = min(5, int(np.bincount(y)[np.unique(y)].min()))
    if len(val_y):
        scores = [model(c).fit(x, y).score(val_x, val_y) for c in CS]
    elif folds >= 2:
        splits = StratifiedKFold(folds, shuffle=True, random_state=given.seed)
        scores = [float(cross_val_score(model(c), x, y, cv=splits).mean()) for c in CS]
    else:  # one shot and nothing to choose by: the middle
        scores = [float(c == CS[len(CS) // 2]) for c in CS]
    c = CS[int(np.argmax(scores))]
    fitted = model(c).fit(x, y)
    # a class without a shot is never predicted
    logits = torch.full((len(test_y), len(given.classes)), -torch.inf, dtype=torch.float32)
    if len(test_y):
        logits[:, fitted.classes_] = torch.from_numpy(fitted.predict_log_proba(test_x)).float()
    return Result.of(given.classes, given.test[1], logits), {"probe_c": c}
