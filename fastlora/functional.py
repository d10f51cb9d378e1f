"""lora_linear: check the arguments, choose the backend, call it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from . import autograd, reference, rng
from . import backend as backends
from .config import BACKENDS, MAX_RANK, OpSpec

__all__ = ["lora_linear", "seed_tensor"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_SEED = 2**63 - 1


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    site: int = 0,
    rows: Tensor | None = None,
    groups: Sequence[int] | None = None,
    active: Sequence[bool] | None = None,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with low-rank updates: `x Wᵀ + bias + scale · (D(x) Aᵀ) Bᵀ`.

    Packed projections (q, k, v in one weight) are G groups of N/G output rows, each with its own A, its own rows of B and its
    own dropout mask. x, lora_a and lora_b get gradients; weight and bias are frozen and get none.

    Args:
        x: (..., K), float32, float16, bfloat16 or float64, any strides.
        weight: (N, K), frozen, of x's dtype (under autocast both are cast).
        bias: (N,), frozen, or None.
        lora_a: (g, R, K) for g active groups, or (R, K) for one; any float dtype (fp32 masters beside a half-precision base).
        lora_b: (g · N/G, R), the rows of the active groups, stacked.
        scale: the factor before B(Ax).
        dropout: probability of dropping an input of the low-rank branch, in [0, 1), rounded to 1/256ths. Pass 0.0 when not
            training.
        seed: int or int64 tensor of one element on x's device, which keys the mask; None draws one from torch's generator.
        site: which layer this is; keys the mask only.
        rows: (M,) integers, the identity of each row (M is the product of x's leading dimensions); None for 0 … M-1. Keys the
            mask only, so that a mask does not depend on how rows are packed, ordered or sharded.
        groups: the original group of each of the G groups given (q alone of a packed q, k, v is (0,)); keys the mask only.
        active: for each group whether it has an adapter, e.g. (True, False, True); default: all.
        backend: "triton", "eager" or "reference"; None for the best one: `fastlora.backend.choose` says which and why. None
            compares a Triton kernel with eager at its first use on a GPU where it was never measured, and uses eager where it
            is wrong or fails; "triton" means exactly that one, unchecked, its errors raised.

    Returns:
        (..., N), of x's dtype, or of autocast's.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit; the message names them.
        RuntimeError: backend="triton" where it cannot run.
    """
    active = _check_groups(weight, lora_a, groups, active)
    groups = tuple(range(len(active))) if groups is None else tuple(groups)
    if lora_a.ndim == 2:
        lora_a = lora_a[None]
    _check_tensors(x, weight, bias, lora_a, lora_b, active)
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose from {', '.join(BACKENDS)}")

    if autocast := torch.is_autocast_enabled(x.device.type):
        x, weight, bias = _autocast(x, weight, bias)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        given = f"x is {x.dtype}, weight {weight.dtype}" + (f", bias {bias.dtype}" if bias is not None else "")
        raise TypeError(f"x, weight and bias must have one dtype: {given}; cast them or use torch.autocast")

    m = x.shape[:-1].numel()
    rows = _check_rows(rows, m, x.device)
    seed = seed_tensor(seed, x.device) if rng.drop_rate(dropout) > 0 else None
    spec = OpSpec(float(scale), float(dropout), int(site), groups, active)
    chosen, _ = backends.choose(x, lora_a.shape[1], seed is not None, backend)
    flat = x.reshape(m, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False) if autocast else contextlib.nullcontext():
        if chosen == "reference":
            y = reference.lora_linear(flat, weight, bias, lora_a, lora_b, spec, seed, rows)
        else:
            served = "trust" if chosen == "triton" and backend is None else chosen
            y = autograd.lora_linear(flat, weight, bias, lora_a, lora_b, spec, seed, rows, served)
    return y.view(*x.shape[:-1], weight.shape[0])


def _check_groups(
    weight: Tensor, lora_a: Tensor, groups: Sequence[int] | None, active: Sequence[bool] | None
) -> tuple[bool, ...]:
    if lora_a.ndim not in (2, 3):
        raise ValueError(f"lora_a must be (R, K) or (g, R, K), got {tuple(lora_a.shape)}")
    given = 1 if lora_a.ndim == 2 else lora_a.shape[0]
    if active is None:
        active = (True,) * given
    active = tuple(bool(flag) for flag in active)
    if sum(active) != given or given == 0:
        raise ValueError(f"lora_a holds {given} adapters, but {sum(active)} of {len(active)} groups are active")
    if groups is not None and len(groups) != len(active):
        raise ValueError(f"groups names {len(groups)} groups, active (default: one for each adapter) {len(active)}")
    if weight.ndim != 2 or weight.shape[0] % len(active):
        raise ValueError(f"weight must be (N, K) with N a multiple of {len(active)} groups, got {tuple(weight.shape)}")
    return active


def _check_tensors(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, active: tuple[bool, ...]
) -> None:
    tensors = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: move them to one device")
    n, k = weight.shape
    rank = lora_a.shape[1]
    expected = {
        "bias": (bias, (n,)),
        "lora_a": (lora_a, (lora_a.shape[0], rank, k)),
        "lora_b": (lora_b, (sum(active) * (n // len(active)), rank)),
    }
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}) for a weight of {(n, k)}, got {tuple(x.shape)}")
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {shape} for a weight of {(n, k)}, got {tuple(tensor.shape)}")
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank must be from 1 to {MAX_RANK}, got {rank}")
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("weight and bias are frozen in lora_linear and get no gradient: call requires_grad_(False) on them")


def _check_rows(rows: Tensor | None, m: int, device: torch.device) -> Tensor | None:
    if rows is None:
        return None
    if rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise TypeError(f"rows must be integers, got {rows.dtype}")
    if rows.device != device or rows.shape != (m,):
        raise ValueError(f"rows must be ({m},) on {device}, got {tuple(rows.shape)} on {rows.device}")
    return rows.to(torch.int64)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A seed as an int64 tensor () on `device`; drawn from torch's generator where none is given.

    Raises:
        TypeError, ValueError: a seed of another kind or range.
    """
    if seed is None:
        return torch.randint(_MAX_SEED, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise TypeError(
                f"seed must be an int64 tensor of one element on {device}, got {seed.dtype}, {seed.numel()} on {seed.device}"
            )
        return seed.reshape(())
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, an int64 tensor of one element or None, got {type(seed).__name__}")
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As autocast does for linear: everything but float64 to its dtype."""
    if x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
