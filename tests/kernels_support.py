"""Cases for the kernels: inputs, the three answers (kernels, eager, float64 truth), and the plans that tests run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastlora import eager, reference
from fastlora.budget import by_group
from fastlora.config import OpSpec
from fastlora.kernels import lora_linear as kernels
from fastlora.kernels.tiles import Plan, Tile
from fastlora.testing import assert_within_budget, poisoned

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Small tiles, so that small shapes have several of them; every plan here is also compiled, by test_compiled_kernels.py.
ONE_PASS = Plan(
    forward=Tile(32, 32, 128, 4, 2), backward=Tile(32, 32, 128, 4, 2), shrink=Tile(32, 0, 128, 4, 2),
    ds_db=Tile(32, 32, 0, 4, 2), da=Tile(32, 0, 128, 4, 2),
    one_pass_forward=True, one_pass_backward=True, da_in_epilogue=True,
)  # fmt: skip
TWO_PASSES = dataclasses.replace(ONE_PASS, one_pass_forward=False, one_pass_backward=False, da_in_epilogue=False)
GROUP_BY_GROUP = dataclasses.replace(TWO_PASSES, one_pass_backward=True, groups_together=False)
PLANS = {"one-pass": ONE_PASS, "two-passes": TWO_PASSES, "group-by-group": GROUP_BY_GROUP}


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of the op. n: rows of weight in each group; layout of x: "plain", "columns" (of a wider one) or "transposed"."""

    m: int = 37
    n: int = 40
    k: int = 133
    r: int = 3
    active: tuple[bool, ...] = (True, True, True)
    keys: tuple[int, ...] = ()
    dropout: float = 0.25
    bias: bool = True
    layout: str = "plain"
    masters: bool = True
    shuffled_rows: bool = True

    @property
    def g(self) -> int:
        return sum(self.active)

    @property
    def spec(self) -> OpSpec:
        return OpSpec(0.7, self.dropout, 5, self.keys or tuple(range(len(self.active))), self.active)


@dataclasses.dataclass
class Inputs:
    """The tensors of a case, on DEVICE."""

    case: Case
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    seed: Tensor
    rows: Tensor | None
    dy: Tensor

    def double(self) -> Inputs:
        changed: dict[str, Any] = {
            n: v.double() for n, v in vars(self).items() if isinstance(v, Tensor) and v.is_floating_point()
        }
        return dataclasses.replace(self, **changed)

    def arguments(self) -> tuple[Any, ...]:
        return self.a, self.b, self.case.spec, self.seed, self.rows


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Inputs of order 1, so that products of order 1 come out."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, over: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) / over).to(dtype).to(DEVICE)

    groups = len(case.active)
    x = normal(case.m, case.k)
    if case.layout == "columns":
        x = normal(case.m, case.k + 7)[:, 3 : 3 + case.k]
    elif case.layout == "transposed":
        x = normal(case.k, case.m).T
    # masters hold values that the compute dtype holds too: the three answers then start from the same numbers
    adapter_dtype = torch.float32 if case.masters else dtype
    rows = torch.randint(0, 2**40, (case.m,), generator=generator).to(DEVICE) if case.shuffled_rows else None
    return Inputs(
        case=case,
        x=x,
        weight=normal(groups * case.n, case.k, over=case.k**0.5),
        bias=normal(groups * case.n) if case.bias else None,
        a=normal(case.g, case.r, case.k, over=case.k**0.5).to(adapter_dtype),
        b=normal(case.g * case.n, case.r).to(adapter_dtype),
        seed=torch.tensor([-(2**62) + 12345 + seed], device=DEVICE),
        rows=rows,
        dy=normal(case.m, groups * case.n),
    )


def run(module: Any, inputs: Inputs, needs: tuple[bool, ...] = (True, True, True), **plan: Any) -> dict[str, Any]:
    """forward and backward of `module`, kernels or eager: y, s, dx, da, db, None where it is not needed."""
    y, s = module.forward(inputs.x, inputs.weight, inputs.bias, *inputs.arguments(), **plan)
    dx, da, db = module.backward(inputs.dy, inputs.x, s, inputs.weight, *inputs.arguments(), needs, **plan)
    return {"y": y, "s": s, "dx": dx, "da": da, "db": db}


def truth(inputs: Inputs) -> dict[str, Tensor]:
    """The equations in float64, the gradients by autograd."""
    exact = inputs.double()
    rows = torch.arange(len(exact.x), device=DEVICE) if exact.rows is None else exact.rows
    leaves = [t.detach().clone().requires_grad_() for t in (exact.x, exact.a, exact.b)]
    x, a, b = leaves
    y = reference.lora_linear(x, exact.weight, exact.bias, a, b, exact.case.spec, exact.seed, rows)
    dx, da, db = torch.autograd.grad(y, leaves, exact.dy)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


def check(inputs: Inputs, dtype: torch.dtype, plan: Plan | None = None) -> None:
    """Kernels, on poisoned memory, against the truth, with eager's own error as the budget."""
    with poisoned():
        got = by_group(inputs.case.spec, run(kernels, inputs, plan=plan))
    plain = by_group(inputs.case.spec, run(eager, inputs))
    assert_within_budget(got, plain, by_group(inputs.case.spec, truth(inputs)), dtype)
