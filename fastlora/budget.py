"""The project's one error rule, and how results are cut so that it holds for each group by itself.

    max|got - truth| ≤ 2 · max|eager - truth| + 4 · eps · max|truth|

truth in float64, eager the plain torch form in the same dtype, eps of that dtype: an error of the order that torch's own
arithmetic makes. fastlora.testing applies it in tests and benchmarks, fastlora.trust at a kernel's first use.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import OpSpec

__all__ = ["Maxima", "Numbers", "by_group"]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What the rule compares, of one result: the largest errors of `got` and of eager, the largest value of the truth."""

    got: float
    eager: float
    truth: float

    def allowed(self, dtype: torch.dtype) -> float:
        """The largest error that the rule allows a result computed in `dtype`."""
        return 2 * self.eager + 4 * torch.finfo(dtype).eps * self.truth

    def ok(self, dtype: torch.dtype) -> bool:
        """Whether the rule holds. NaN never passes."""
        return self.got <= self.allowed(dtype)

    def share(self, dtype: torch.dtype) -> float:
        """The error as a share of what is allowed: up to 1 the rule holds. Infinite for NaN."""
        allowed = self.allowed(dtype)
        share = self.got / allowed if allowed > 0 else (math.inf if self.got else 0.0)
        return math.inf if math.isnan(share) else share

    def words(self, dtype: torch.dtype) -> str:
        """The three errors in a line."""
        return f"got {self.got:.2e}, eager {self.eager:.2e}, allowed {self.allowed(dtype):.2e}"


class Maxima:
    """The `Numbers` of named results, taken in some rows at a time; they stay on their device until they are read."""

    def __init__(self) -> None:
        self._of: dict[str, Tensor] = {}

    def add(self, got: Mapping[str, Tensor], eager: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> None:
        """Take in results, or some rows of them; the names are those of `truth`."""
        for name, exact in truth.items():
            if exact.numel() == 0:
                continue
            want = exact.double()
            errors = [(value[name].double() - want).abs().max() for value in (got, eager)]
            numbers = torch.stack([*errors, want.abs().max()])
            self._of[name] = torch.maximum(self._of[name], numbers) if name in self._of else numbers  # NaN stays

    def read(self) -> dict[str, Numbers]:
        """The numbers of each result that has any."""
        return {name: Numbers(*numbers.tolist()) for name, numbers in self._of.items()}


def by_group(spec: OpSpec, results: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Each of y, s, dx, da, db on its own, those with groups cut into them; None is left out.

    An error in one group must not hide behind another's scale.
    """
    parts = {"y": (len(spec.active), 1), "s": (sum(spec.active), 1), "da": (sum(spec.active), 0), "db": (sum(spec.active), 0)}
    cut: dict[str, Tensor] = {}
    for name, value in results.items():
        if value is None:
            continue
        if name in parts:
            cut.update({f"{name}[{i}]": part for i, part in enumerate(value.chunk(*parts[name]))})
        else:
            cut[name] = value
    return cut
