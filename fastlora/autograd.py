"""One autograd.Function around the backends. Saved for backward: x, s and the seed; no mask, no dropped x, no dense update.

Outside torch.compile the backend is called as it is. Under torch.compile the same two calls become raw torch.library ops with
fake registrations, so a patched model compiles without a graph break and no second autograd registration exists.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager, trust
from .config import OpSpec

__all__ = ["lora_linear"]

_ARGUMENTS = (
    "Tensor a, Tensor b, Tensor? seed, Tensor? rows, float scale, float dropout, int site, int[] groups, bool[] active,"
    " str backend"
)


def _module(backend: str) -> ModuleType:
    if backend != "triton":
        return {"eager": eager, "trust": trust}[backend]
    from .kernels import lora_linear as kernels  # Triton only where it is used: fastlora imports without it

    return kernels


def _forward_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None, rows: Tensor | None,
    scale: float, dropout: float, site: int, groups: list[int], active: list[bool], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    spec = OpSpec(scale, dropout, site, tuple(groups), tuple(active))
    return _module(backend).forward(x, weight, bias, a, b, spec, seed, rows)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0] * a.shape[1])


def _backward_op(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, rows: Tensor | None,
    scale: float, dropout: float, site: int, groups: list[int], active: list[bool], backend: str, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    spec = OpSpec(scale, dropout, site, tuple(groups), tuple(active))
    dx, da, db = needs
    grads = _module(backend).backward(dy, x, s, weight, a, b, spec, seed, rows, (dx, da, db))
    # an op cannot return None: what is not needed is an empty tensor
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


def _backward_fake(
    dy: Tensor, x: Tensor, s: Tensor, weight: Tensor, a: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((x, x.shape), (a, a.shape), (b, b.shape))
    dx, da, db = (t.new_empty(shape) if need else x.new_empty(0) for (t, shape), need in zip(shapes, rest[-1], strict=True))
    return dx, da, db


def _define(name: str, schema: str, implementation: Any, fake: Any) -> None:
    torch.library.define(f"fastlora::{name}", schema)
    torch.library.impl(f"fastlora::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"fastlora::{name}", fake)


_define(
    "lora_linear_forward",
    f"(Tensor x, Tensor weight, Tensor? bias, {_ARGUMENTS}) -> (Tensor, Tensor)",
    _forward_op,
    _forward_fake,
)
_define(
    "lora_linear_backward",
    f"(Tensor dy, Tensor x, Tensor s, Tensor weight, {_ARGUMENTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)


def _constants(spec: OpSpec, backend: str) -> tuple[Any, ...]:
    return spec.scale, spec.dropout, spec.site, list(spec.groups), list(spec.active), backend


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, seed: Tensor | None,
        rows: Tensor | None, spec: OpSpec, backend: str,
    ) -> Tensor:  # fmt: skip
        # The op keeps its own copy: a seed advanced in place between forward and backward would change the mask.
        seed = None if seed is None else seed.clone()
        if torch.compiler.is_compiling():
            constants = _constants(spec, backend)
            y, s = torch.ops.fastlora.lora_linear_forward(x, weight, bias, a, b, seed, rows, *constants)
        else:
            y, s = _module(backend).forward(x, weight, bias, a, b, spec, seed, rows)
        # dB alone needs neither x nor W, dA alone not W
        wants_dx, wants_da = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if wants_dx or wants_da else None, s, weight, a, b, seed, rows)
        ctx.spec, ctx.backend = spec, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, a, b, seed, rows = ctx.saved_tensors
        x = s.new_empty(s.shape[0], weight.shape[1]) if x is None else x
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[3], ctx.needs_input_grad[4])
        if torch.compiler.is_compiling():
            constants = _constants(ctx.spec, ctx.backend)
            grads = torch.ops.fastlora.lora_linear_backward(dy, x, s, weight, a, b, seed, rows, *constants, list(needs))
            dx, da, db = (g if need else None for g, need in zip(grads, needs, strict=True))
        else:
            dx, da, db = _module(ctx.backend).backward(dy, x, s, weight, a, b, ctx.spec, seed, rows, needs)
        return dx, None, None, da, db, None, None, None, None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, spec: OpSpec, seed: Tensor | None,
    rows: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """The differentiable op on checked, two-dimensional tensors: arguments as `fastlora.eager.forward` takes them.

    backend: "eager"; "trust" for the kernels once they are known to be right here; "triton" for the kernels in any case.
    """
    return _LoRALinear.apply(x, weight, bias, a, b, seed, rows, spec, backend)
