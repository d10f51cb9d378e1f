"""The error budget and the CLIP shapes: one home for the tests and for the benchmarks' gate."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import thin  # noqa: F401  its ops, which count_flops counts
from .budget import Maxima, Numbers
from .encoders import short_attention  # noqa: F401  likewise

__all__ = [
    "CLIP_SHAPES",
    "assert_within_budget",
    "assert_within_expected_budget",
    "budget_report",
    "count_flops",
    "expected_budget_report",
    "poisoned",
    "repair_interpreter",
]

# (width D, tokens of 32 images): packed q, k, v is (M, D) -> (M, 3D)
CLIP_SHAPES = {"ViT-B-32": (768, 32 * 50), "ViT-B-16": (768, 32 * 197), "ViT-L-14": (1024, 32 * 257), "text": (512, 9000)}


def budget_report(
    got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> list[tuple[bool, str]]:
    """For each named result whether it is within the budget, and a line that says so.

    max|got - truth| ≤ 2 · max|eager - truth| + 4 · eps · max|truth|, with truth in float64, eager the plain torch form in the
    same dtype, eps of `dtype`: the rule of fastlora.budget, per output.
    """
    return expected_budget_report([got], [eager], [truth], dtype)


def expected_budget_report(
    got: list[dict[str, Tensor]], eager: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], dtype: torch.dtype
) -> list[tuple[bool, str]]:
    """`budget_report` of several independent draws: every maximum of its rule is replaced by its mean over the draws.

    For results whose largest error is one random number, not the largest of many: a single draw would compare luck.
    """
    draws = []
    for mine, plain, want in zip(got, eager, truth, strict=True):
        maxima = Maxima()
        maxima.add(mine, plain, want)
        draws.append(maxima.read())
    rows = []
    for name in truth[0]:
        drawn = [dataclasses.astuple(numbers[name]) for numbers in draws if name in numbers]
        mean = Numbers(*map(statistics.fmean, zip(*drawn, strict=True))) if drawn else Numbers(0.0, 0.0, 0.0)
        rows.append((mean.ok(dtype), f"{name}: {mean.words(dtype)}"))
    return rows


def assert_within_budget(
    got: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Raise AssertionError naming every result outside the budget of `budget_report`."""
    assert_within_expected_budget([got], [eager], [truth], dtype)


def assert_within_expected_budget(
    got: list[dict[str, Tensor]], eager: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], dtype: torch.dtype
) -> None:
    """Raise AssertionError naming every result outside the budget of `expected_budget_report`."""
    failed = [line for ok, line in expected_budget_report(got, eager, truth, dtype) if not ok]
    assert not failed, "outside the error budget: " + "; ".join(failed)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: whatever a kernel leaves unwritten, or reads before it was written, shows."""
    empty = torch.empty

    def nan(*arguments: Any, **options: Any) -> Tensor:
        made = empty(*arguments, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with mock.patch.object(torch, "empty", nan):
        yield


def count_flops(step: Callable[[], object]) -> int:
    """FLOPs of the products and attentions in `step`, forward and backward, a causal mask not taken off.

    As torch's counter sees them, and what it leaves out on a CPU: oneDNN's products, those that add to their first argument,
    attention, and fastlora's own.
    """
    from torch.utils import flop_counter as torchs  # imports Triton, which reads TRITON_INTERPRET then

    def product(x: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * x[-1] * math.prod(out_shape)

    def added(_: Any, x: Any, *__: Any, out_shape: Any, **___: Any) -> int:
        return product(x, out_shape=out_shape)

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return torchs.sdpa_flop_count(q, k, v)

    def attention_backward(dy: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return torchs.sdpa_backward_flop_count(dy, q, k, v)

    def shrink(x: Any, a: Any, *_: Any, **__: Any) -> int:
        return 2 * x[0] * math.prod(a)

    def shrink_backward(_: Any, x: Any, a: Any, dx: Any, *__: Any, **___: Any) -> int:
        return shrink(x, a) * (1 if dx is None else 2)

    def expand_backward(dy: Any, _: Any, b: Any, *__: Any, **___: Any) -> int:
        return 2 * shrink(dy, b)

    def short(q: Any, k: Any, _: Any, heads: int, prefix: int, runs: Any, causal: bool, pooled: bool, **__: Any) -> int:
        pairs = 0 if pooled else prefix * prefix
        for count, length in zip(runs[::2], runs[1::2], strict=True):
            pairs += count * (prefix + length) * (1 if pooled else length)
        return 4 * pairs * q[1]

    def short_backward(_: Any, q: Any, k: Any, v: Any, dq: Any, dk: Any, dv: Any, *rest: Any, **__: Any) -> int:
        return short(q, k, v, *rest) * 5 // 2  # q kᵀ again, and four products

    aten, ours = torch.ops.aten, torch.ops.fastlora
    unseen = {
        torch.ops.mkldnn._linear_pointwise: product,
        aten.addmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        ours.shrink: shrink,
        ours.shrink_backward: shrink_backward,
        ours.expand_backward: expand_backward,
        ours.short_attention: short,
        ours.short_attention_backward: short_backward,
    }
    with torchs.FlopCounterMode(display=False, custom_mapping=unseen) as counter:
        step()
    return counter.get_total_flops()


def repair_interpreter() -> None:
    """Let Triton's interpreter run loops under NumPy 2.5, before the first interpreted kernel; nothing where it can already.

    Up to Triton 3.7 a loop's bound, an array of one element there, went through int(), which NumPy deprecated and 2.5 refuses.
    """
    if importlib.util.find_spec("triton") is None:
        return
    if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 8):
        return
    from triton.runtime import interpreter

    if hasattr(interpreter, "_fastlora_repaired"):
        return
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair
    interpreter._fastlora_repaired = True
