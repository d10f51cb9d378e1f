"""The one product of the CPU path, x Wᵀ + bias + add, by whichever of torch's libraries is fastest.

torch hands float32 products to its BLAS. oneDNN, which ships with torch as well, adds the bias and a second summand as it
writes the result, and is never slow on the thin products of LoRA, where a BLAS may lose up to six times its speed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["frozen_linear", "linear"]

# oneDNN sums all of K in one accumulator: beyond this its rounding error is over 1.5 times that of a BLAS, which sums blocks.
# Its kernels for AVX2 are worse: 3 times a BLAS at 256 columns, more than the error rule allows at 768, and no faster.
_LONGEST, _LONGEST_AVX2 = 1024, 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias + add, (M, N), without autograd.

    Args:
        x: (M, K).
        weight: (N, K), any strides.
        bias: (N,) or None.
        add: (M, N) or None. All of one dtype.
    """
    if not _onednn(x, weight):
        return _torch(x, weight, bias, add)
    if add is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """`linear`, differentiable in x and add; in weight and bias too where they are trained, by torch's own product."""
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    if trained or torch.is_autocast_enabled(x.device.type) or not _onednn(x, weight):
        return _torch(x, weight, bias, add)
    return _FrozenLinear.apply(x, weight, bias, add)


class _FrozenLinear(torch.autograd.Function):
    """Keeps the weight for backward and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return linear(x, weight, bias, add)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        dx = linear(dy, weight.T) if ctx.needs_input_grad[0] else None
        return dx, None, None, dy if ctx.needs_input_grad[3] else None


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None) -> Tensor:
    if add is None:
        return F.linear(x, weight, bias)
    return (add.clone() if bias is None else add + bias).addmm_(x, weight.T)


@functools.cache
def _longest() -> int:
    return _LONGEST if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else _LONGEST_AVX2


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes: float32 on a CPU whose torch has it. 16-bit products go there anyway."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and 0 < x.shape[1] <= _longest()
        and len(x) > 0
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and (weight.is_contiguous() or weight.T.is_contiguous())  # any other weight takes a loop a thousand times slower
    )
