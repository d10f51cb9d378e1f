"""x + c_proj(act(c_fc(normed))) of a frozen MLP on a CPU: some rows at a time, so that what lies between the products stays in
the cache. Backward keeps c_fc's output and nothing else; the usual chain of operations writes and reads several tensors of that
size more, each on fresh pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..products import linear

__all__ = ["QUICK", "frozen_mlp", "is_quick", "serves"]

QUICK = 1.702  # QuickGELU(h) = h · sigmoid(1.702 h) = silu(1.702 h) / 1.702

# So many bytes of c_fc's output at a time: half of a usual last-level cache, and rows enough for a product's full speed.
_CHUNK = 2**24


def is_quick(mlp: Any) -> bool:
    """Whether its activation is QuickGELU: open_clip's and OpenAI's classes are two of one name."""
    return type(mlp.gelu).__name__ == "QuickGELU"


def serves(mlp: Any, x: Tensor) -> bool:
    """Whether `frozen_mlp` computes this MLP of plain linears: float32 on a CPU, GELU or QuickGELU, nothing trained here."""
    activation = is_quick(mlp) or (type(mlp.gelu) is nn.GELU and mlp.gelu.approximate == "none")
    trained = torch.is_grad_enabled() and any(
        p.requires_grad for layer in (mlp.c_fc, mlp.c_proj) for p in (layer.weight, layer.bias)
    )
    ours = x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()
    return activation and not trained and ours


def frozen_mlp(mlp: Any, x: Tensor, normed: Tensor) -> Tensor:
    """x (M, D) + mlp(normed (M, D)), differentiable in both."""
    weights = mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias
    return _FrozenMLP.apply(x, normed, *weights, is_quick(mlp))


class _FrozenMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, normed: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, quick: bool
    ) -> Tensor:
        y = torch.empty_like(x)
        # silu(1.702 h) stands for QuickGELU: one kernel forward and one backward, the factors go where they cost least
        factor = QUICK if quick else 1.0
        activate = torch.ops.aten.silu.out if quick else torch.ops.aten.gelu.out
        hidden, activated = [], normed.new_empty(0)
        for rows in _rows(len(x), len(w_fc)):
            h = linear(normed[rows], w_fc, b_fc)
            h = h.mul_(factor) if quick else h
            activate(h, out=activated.resize_(h.shape))
            torch.add(x[rows], b_proj, out=y[rows]).addmm_(activated, w_proj.T, alpha=1 / factor)
            hidden.append(h)
        ctx.save_for_backward(w_fc, w_proj, *hidden)
        ctx.quick = quick
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w_fc, w_proj, *hidden = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return dy, *(None,) * 6
        through = torch.ops.aten.silu_backward if ctx.quick else torch.ops.aten.gelu_backward
        d_normed = dy.new_empty(dy.shape)
        for rows, h in zip(_rows(len(dy), len(w_fc)), hidden, strict=True):
            dh = linear(dy[rows], w_proj.T)  # QuickGELU's two factors cancel
            torch.mm(through.grad_input(dh, h, grad_input=dh), w_fc, out=d_normed[rows])
        return dy, d_normed, *(None,) * 5


def _rows(count: int, width: int) -> list[slice]:
    """Equal pieces of `count` rows: so many that one of `width` floats each is within the chunk."""
    pieces = max(1, -(-count * width * 4 // _CHUNK))
    step = max(1, -(-count // pieces))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
