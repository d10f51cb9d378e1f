"""The strongest form of a LoRA layer that needs no kernel of its own: cuBLAS adds to what it finds (beta = 1), torch drops out.

    y = x Wᵀ + bias, one product for packed q, k, v; then y_g += scale · s_g B_gᵀ in place, s_g = D_g(x) A_gᵀ
    dx = dy W, then dx += D_gᵀ(ds_g A_g), ds_g = scale · dy_g B_g

Without dropout the groups share D(x) = x: their A are one product of G · R rows. With it every group has a mask of its own,
kept for backward in a byte per element, as `torch.native_dropout` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Draw", "beta_one", "torchs_dropout"]

# draw(x, group) -> (D(x), the elements that are kept, bool)
Draw = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def torchs_dropout(p: float) -> Draw:
    """torch's own dropout at rate `p`: one kernel, which gives the mask as well."""
    return lambda x, group: torch.native_dropout(x, p, True)


def beta_one(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, p: float, draw: Draw) -> Tensor:
    """A packed linear with LoRA on every group.

    Args:
        x: (M, K), of weight's dtype.
        weight: (N, K), frozen.
        bias: (N,), frozen.
        a: (G, R, K) fp32.
        b: (N, R) fp32, stacked by group.
        p: the rate of dropout; 0 draws nothing.
        draw: how dropout is drawn.

    Returns:
        (M, N).
    """
    result: Tensor = _BetaOne.apply(x, weight, bias, a, b, scale, p, draw)
    return result


class _BetaOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scale: float, p: float, draw: Draw
    ) -> Tensor:
        groups, rank, _ = a.shape
        a_half, b_half = a.to(x.dtype), b.to(x.dtype)
        y = torch.addmm(bias, x, weight.T)
        masks: list[Tensor] = []
        if p:
            s = x.new_empty(groups, len(x), rank)
            for group in range(groups):
                dropped, mask = draw(x, group)
                torch.mm(dropped, a_half[group].T, out=s[group])
                masks.append(mask)
        else:
            s = (x @ a_half.flatten(0, 1).T).view(len(x), groups, rank).transpose(0, 1)
        for y_g, s_g, b_g in zip(y.chunk(groups, 1), s, b_half.chunk(groups), strict=True):
            y_g.addmm_(s_g, b_g.T, alpha=scale)
        ctx.save_for_backward(x, weight, a_half, b_half, s, *masks)
        ctx.scale, ctx.factor, ctx.dtypes = scale, 1 / (1 - p), (a.dtype, b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, s, *masks = ctx.saved_tensors
        groups, rank, _ = a.shape
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        ds = x.new_empty(len(x), groups, rank)
        db = []
        for group, (dy_g, b_g) in enumerate(zip(dy.chunk(groups, 1), b.chunk(groups), strict=True)):
            ds[:, group] = torch.mm(dy_g, b_g).mul_(ctx.scale)
            db.append(torch.mm(dy_g.T, s[group]).mul_(ctx.scale))
        if not masks:
            da = (ds.flatten(1).T @ x).view_as(a)
            if dx is not None:
                dx.addmm_(ds.flatten(1), a.flatten(0, 1))
        else:
            da = torch.empty_like(a)
            for group, mask in enumerate(masks):
                ds_g = ds[:, group] * ctx.factor
                torch.mm(ds_g.T, x * mask, out=da[group])
                if dx is not None:
                    dx.addcmul_(torch.mm(ds_g, a[group]), mask)
        dtype_a, dtype_b = ctx.dtypes
        return dx, None, None, da.to(dtype_a), torch.cat(db).to(dtype_b), None, None, None
