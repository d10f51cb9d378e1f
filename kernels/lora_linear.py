"""The launchers: forward and backward of the op on Triton.

    y  = x Wᵀ + bias + scale · s Bᵀ,   s = D(x) Aᵀ
    ds = scale · dy B;   dB = scale · dyᵀ s;   dA = dsᵀ D(x);   dx = dy W + Dᵀ(ds A)

The signatures are those of fastlora.eager; no autograd. Which kernels run, and with which tiles, is the plan's choice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from fastlora.config import OpSpec
from fastlora.rng import bit_planes

from . import tiles
from .backward import backward_kernel, da_kernel, ds_db_kernel
from .forward import forward_kernel, shrink_kernel
from .launch import launch
from .packing import pack_kernel, reduce_kernel
from .tiles import Plan, Tile

__all__ = ["backward", "forward"]

# Offsets inside a tile are 32-bit; a row or column of x this far from the next would pass them.
_MAX_STRIDE = 2**31 // 256
_PACK = Tile(0, 0, 0, 4, 1)
_PACK_BLOCK = 1024
_REDUCE_BLOCK = 128
_REDUCE_ABREAST = 16


@dataclasses.dataclass(frozen=True)
class _Call:
    """What both directions derive from their arguments."""

    plan: Plan
    rank: int  # R
    padded: int  # RANK, a power of two of at least 16
    width: int  # N/G, the columns of a group
    factor: float  # 1 / (1 - drop rate)
    site: int
    constants: dict[str, Any]  # KEYS, J, PLANES, RANK, PRECISION
    positions: tuple[int, ...]  # of the groups with an adapter
    plain: tuple[int, ...]  # of those without


def _call(x: Tensor, weight: Tensor, a: Tensor, spec: OpSpec, seed: Tensor | None, plan: Plan | None) -> _Call:
    j, planes = bit_planes(spec.dropout) if seed is not None else (0, 0)
    rank = a.shape[1]
    padded = tiles.padded_rank(rank)
    precision = tiles.precision_of(x.dtype)
    kind = tiles.Call(tiles.architecture(x.device), precision, padded, planes > 0)
    positions = tuple(i for i, active in enumerate(spec.active) if active)
    return _Call(
        plan=plan or tiles.choose(kind),
        rank=rank,
        padded=padded,
        width=weight.shape[0] // len(spec.active),
        factor=1.0 / (1.0 - j / 2**planes),
        site=spec.site,
        constants={
            "KEYS": tuple(spec.groups[i] for i in positions),
            "J": j,
            "PLANES": planes,
            "RANK": padded,
            "PRECISION": "ieee" if precision == "ieee" else "tf32",
        },
        positions=positions,
        plain=tuple(i for i, active in enumerate(spec.active) if not active),
    )


def _near(x: Tensor) -> Tensor:
    """x itself, or a copy where its strides are beyond 32-bit offsets inside a tile."""
    return x.contiguous() if max(x.stride()) >= _MAX_STRIDE else x


def _pack(a: Tensor, b: Tensor, dtype: torch.dtype, padded: int) -> tuple[Tensor, Tensor]:
    """a (g, padded, K up to 16) and b (g·N/G, padded), of `dtype`, filled with zeros; themselves where they are so already."""
    g, rank, k = a.shape
    columns = triton.cdiv(k, 16) * 16
    if a.dtype == b.dtype == dtype and rank == padded and k == columns and a.is_contiguous() and b.is_contiguous():
        return a, b
    a_packed = torch.empty(g, padded, columns, dtype=dtype, device=a.device)
    b_packed = torch.empty(len(b), padded, dtype=dtype, device=b.device)
    a_programs = triton.cdiv(a_packed.numel(), _PACK_BLOCK)
    launch(
        pack_kernel, a_programs + triton.cdiv(b_packed.numel(), _PACK_BLOCK), _PACK,
        a_ptr=a, b_ptr=b, a_packed_ptr=a_packed, b_packed_ptr=b_packed,
        G=g, R=rank, K=k, K_PADDED=columns, B_ROWS=len(b), a_programs=a_programs,
        stride_ag=a.stride(0), stride_ar=a.stride(1), stride_ak=a.stride(2), stride_bn=b.stride(0), stride_br=b.stride(1),
        RANK=padded, BLOCK=_PACK_BLOCK,
    )  # fmt: skip
    return a_packed, b_packed


def _reduce(partial: Tensor, out: Tensor, rank: int, strides: tuple[int, ...], factor: float) -> None:
    """Sum partial (slots, g, RANK, columns) over its slots into out, whose strides are (group, rank, column)."""
    slots, g, padded, columns = partial.shape
    launch(
        reduce_kernel, triton.cdiv(g * rank * columns, _REDUCE_BLOCK), _PACK,
        partial_ptr=partial, out_ptr=out, slots=slots, G=g, R=rank, COLUMNS=columns,
        stride_g=strides[0], stride_r=strides[1], stride_c=strides[2], factor=factor,
        RANK=padded, ABREAST=_REDUCE_ABREAST, BLOCK=_REDUCE_BLOCK,
    )  # fmt: skip


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    spec: OpSpec,
    seed: Tensor | None,
    rows: Tensor | None,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """x (M, K), weight (N, K), bias (N,), a (g, R, K), b (g·N/G, R), rows (M,) -> y (M, N), s (M, g·R), of x's dtype.

    a and b may be float32 masters beside a half-precision x and weight. plan: instead of the table's row.
    """
    (m, k), n = x.shape, weight.shape[0]
    call = _call(x, weight, a, spec, seed, plan)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    s = torch.empty(m, len(call.positions) * call.rank, dtype=x.dtype, device=x.device)
    if y.numel() == 0 or k == 0:  # without columns of x the bias is all
        y.zero_() if bias is None else y.copy_(bias.expand_as(y))
        return y, s.zero_()
    x, weight = _near(x), _near(weight)
    a, b = _pack(a, b, x.dtype, call.padded)
    plan, tile, shrink = call.plan, call.plan.forward, call.plan.shrink
    one_pass = plan.one_pass_forward
    constants = dict(call.constants)
    keys = constants.pop("KEYS")
    adapter = {"a_ptr": a, "s_ptr": s, "seed_ptr": seed, "rows_ptr": rows, "R": call.rank, "stride_ar": a.stride(1)}
    sizes = {"M": m, "K": k, "stride_xm": x.stride(0), "stride_xk": x.stride(1), "site": call.site}
    if call.positions and not one_pass:
        per = len(keys) if plan.groups_together else 1
        launch(
            shrink_kernel, triton.cdiv(m, shrink.m) * len(keys) // per, shrink,
            x_ptr=x, **adapter, **sizes, **constants, KEYS=keys, PER=per, EVEN_K=k % shrink.k == 0,
            BLOCK_M=shrink.m, BLOCK_K=shrink.k, STAGES=shrink.stages,
        )  # fmt: skip
    # the groups with adapters, then those without: these cost a plain product
    for positions, has_lora in ((call.positions, True), (call.plain, False)):
        if not positions:
            continue
        tiles_m, tiles_n = triton.cdiv(m, tile.m), triton.cdiv(call.width, tile.n)
        computes_s = has_lora and one_pass
        span = 1
        if computes_s:
            span = tiles.span(tiles_m, len(positions), call.width, tile.n, tiles.multiprocessors(x.device))
        launch(
            forward_kernel, tiles_m * triton.cdiv(tiles_n, span) * len(positions), tile,
            x_ptr=x, w_ptr=weight, bias_ptr=bias, b_ptr=b, y_ptr=y, **adapter, **sizes, **constants,
            N=n, GROUP_N=call.width, stride_wn=weight.stride(0), stride_wk=weight.stride(1), scale=spec.scale, span=span,
            POSITIONS=positions, KEYS=keys, HAS_LORA=has_lora, ONE_PASS=one_pass,
            EVEN_K=k % (max(tile.k, shrink.k) if computes_s else tile.k) == 0,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=8, SHRINK_K=shrink.k, SHRINK_STAGES=shrink.stages,
        )  # fmt: skip
    return y, s


def backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    spec: OpSpec,
    seed: Tensor | None,
    rows: Tensor | None,
    needs: tuple[bool, bool, bool],
    *,
    plan: Plan | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy (M, N) and what forward took and saved -> dx (M, K), da, db in the dtypes of x, a and b; None where not needed.

    The same bits on each run: no atomics. plan: instead of the table's row.
    """
    need_dx, need_da, need_db = needs
    (m, n), k = dy.shape, weight.shape[1]
    call = _call(x, weight, a, spec, seed, plan)
    plan, g, device = call.plan, len(call.positions), dy.device
    dx = torch.empty(m, k, dtype=x.dtype, device=device) if need_dx else None
    da = torch.empty(a.shape, dtype=a.dtype, device=device) if need_da else None
    db = torch.empty(b.shape, dtype=b.dtype, device=device) if need_db else None
    if m == 0 or n == 0 or k == 0:
        for grad in (dx, da, db):
            if grad is not None:
                grad.zero_()
        return dx, da, db
    x, dy, weight = _near(x), _near(dy), _near(weight)
    a_packed, b_packed = _pack(a, b, x.dtype, call.padded)
    one_pass = need_dx and plan.one_pass_backward
    da_in_epilogue = need_dx and need_da and plan.da_in_epilogue
    constants = dict(call.constants)
    keys, j, planes = (constants.pop(name) for name in ("KEYS", "J", "PLANES"))
    mask = {"KEYS": keys, "J": j, "PLANES": planes, "seed_ptr": seed, "rows_ptr": rows, "site": call.site}
    x_strides = {"stride_xm": x.stride(0), "stride_xk": x.stride(1)}
    dy_strides = {"stride_dym": dy.stride(0), "stride_dyn": dy.stride(1)}

    ds = None
    if (need_dx and not one_pass) or (need_da and not da_in_epilogue):
        ds = torch.empty(m, g * call.padded, dtype=x.dtype, device=device)

    def slots_for(tile: Tile, columns: int) -> int:
        """How many programs share the row tiles, where each row tile takes `columns` of them."""
        wanted = tiles.multiprocessors(device) * tile.per_sm // columns
        return max(1, min(triton.cdiv(m, tile.m), wanted))

    def partial(slots: int, columns: int) -> Tensor:
        return torch.empty(slots, g, call.padded, columns, dtype=torch.float32, device=device)

    da_partial = db_partial = None
    if g and not one_pass and (ds is not None or need_db):
        tile = plan.ds_db
        slots = slots_for(tile, g)
        db_partial = partial(slots, call.width) if need_db else None
        launch(
            ds_db_kernel, slots * g, tile,
            dy_ptr=dy, s_ptr=s, b_ptr=b_packed, ds_ptr=ds, db_ptr=db_partial,
            M=m, GROUP_N=call.width, R=call.rank, slots=slots, **dy_strides, factor=spec.scale * call.factor,
            POSITIONS=call.positions, **constants, BLOCK_M=tile.m, BLOCK_N=tile.n,
        )  # fmt: skip
    if need_dx:
        tile = plan.backward
        columns = triton.cdiv(k, tile.k)
        slots = slots_for(tile, columns)
        da_partial = partial(slots, k) if da_in_epilogue else None
        if one_pass and need_db:
            # the programs of a row of tiles take turns, so that each sums over row tiles of its own
            db_partial = partial(min(triton.cdiv(m, tile.m), slots * columns), call.width)
        launch(
            backward_kernel, slots * columns, tile,
            dy_ptr=dy, x_ptr=x, s_ptr=s, w_ptr=weight, a_ptr=a_packed, b_ptr=b_packed, ds_ptr=ds, dx_ptr=dx, da_ptr=da_partial,
            db_ptr=db_partial if one_pass else None, M=m, N=n, K=k, GROUP_N=call.width, R=call.rank, slots=slots,
            **dy_strides, **x_strides, stride_wn=weight.stride(0), stride_wk=weight.stride(1), stride_ar=a_packed.stride(1),
            scale=spec.scale, **mask, POSITIONS=call.positions, PLAIN=call.plain, ONE_PASS=one_pass,
            EVEN_N=(call.width if one_pass else n) % tile.n == 0, **constants,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        )  # fmt: skip
    if need_da and not da_in_epilogue and g:
        tile = plan.da
        per = g if plan.groups_together else 1
        columns = triton.cdiv(k, tile.k) * (g // per)
        slots = slots_for(tile, columns)
        da_partial = partial(slots, k)
        launch(
            da_kernel, slots * columns, tile,
            x_ptr=x, ds_ptr=ds, da_ptr=da_partial, M=m, K=k, slots=slots, **x_strides, **mask, **constants, PER=per,
            BLOCK_M=tile.m, BLOCK_K=tile.k,
        )  # fmt: skip
    if da is not None and da_partial is not None:
        _reduce(da_partial, da, call.rank, da.stride(), 1.0)
    if db is not None and db_partial is not None:
        _reduce(db_partial, db, call.rank, (call.width * db.stride(0), db.stride(1), db.stride(0)), spec.scale)
    return dx, da, db
