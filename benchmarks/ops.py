"""The contestants of one adapted layer: a linear, packed q, k, v, or an MLP, all on the same weights, adapters and inputs.

Each contestant says how it computes one layer; `bind` ties it to one input set and gives three calls: forward, backward, both.
Needs PyTorch and fastlora only, so that it runs on machines without open_clip.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cublas
import fastlora
from fastlora import reference, rng, thin
from fastlora.config import OpSpec
from fastlora.testing import budget_report
from shapes import Case, InputSet, Layer

# drop(x, group, site) -> D(x): torch's dropout when timed, the library's mask in the gate so that all can be compared
Drop = Callable[[Tensor, int, int], Tensor]
# layer_forward(x, layer, site) -> the outputs: one tensor, or one per group where the contestant's user gets them apart
LayerForward = Callable[[Tensor, Layer, int], list[Tensor]]


def shared_mask(inputs: InputSet) -> Drop:
    """D with the library's own mask, of any dtype."""
    case = inputs.case

    def drop(x: Tensor, group: int, site: int) -> Tensor:
        rows = torch.arange(len(x), device=x.device)
        return x * rng.keep_multiplier(inputs.seed, site, group, rows, x.shape[1], case.dropout, x.dtype)

    return drop


class Contestant:
    """How one way of adapting computes a layer. `trains`: "nothing", "adapters" or "weights"."""

    name = ""
    trains = "adapters"
    compiles = False  # whether Inductor compiles it, which takes half a minute a case on a CPU

    def missing(self, case: Case) -> str | None:
        """Why this contestant cannot run the case here, or None."""
        return None

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        """The layer's forward for one input set; drop replaces torch's own dropout (in the gate)."""
        raise NotImplementedError


def _torch_dropout(case: Case) -> Drop:
    return lambda x, group, site: F.dropout(x, case.dropout, training=True) if case.dropout else x


class Frozen(Contestant):
    """The floor: the base layer alone, with the gradient of its input."""

    name, trains = "frozen", "nothing"

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        return lambda x, layer, site: [F.linear(x, layer.weight, layer.bias)]


class FullFineTuning(Frozen):
    """No adapter; weight and bias get gradients."""

    name, trains = "full fine-tuning", "weights"


class FastLoRA(Contestant):
    """fastlora.lora_linear with one of its backends."""

    def __init__(self, backend: str) -> None:
        self.backend, self.name = backend, f"fastlora {backend}"

    def missing(self, case: Case) -> str | None:
        if self.backend == "triton" and not case.device.startswith("cuda"):
            return "no GPU: Triton's interpreter is not a speed"
        return None

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        case = inputs.case
        return lambda x, layer, site: [
            fastlora.lora_linear(
                x, layer.weight, layer.bias, layer.a, layer.b, scale=case.scale, dropout=case.dropout, seed=inputs.seed,
                site=site, groups=range(case.groups), backend=self.backend,
            )
        ]  # fmt: skip


class CublasBeta(Contestant):
    """What a careful engineer writes without a kernel: one packed product, LoRA added in place by cuBLAS, torch's dropout."""

    name = "cuBLAS beta=1"

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        case = inputs.case

        def given(site: int) -> cublas.Draw:
            def draw(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
                assert drop is not None
                ones = torch.ones((), dtype=x.dtype, device=x.device).expand_as(x)
                return drop(x, group, site), drop(ones, group, site) != 0

            return draw

        return lambda x, layer, site: [
            cublas.beta_one(
                x, layer.weight, layer.bias, layer.a, layer.b, case.scale, case.dropout,
                given(site) if drop else cublas.torchs_dropout(case.dropout),
            )
        ]  # fmt: skip


def _naive(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, groups: int, scale: float,
    drop: Callable[[Tensor, int], Tensor],
) -> list[Tensor]:  # fmt: skip
    out = []
    per_group = zip(weight.chunk(groups), bias.chunk(groups), a, b.chunk(groups), strict=True)
    for group, (w_g, bias_g, a_g, b_g) in enumerate(per_group):
        low = F.linear(drop(x, group), a_g.to(x.dtype))
        out.append(F.linear(x, w_g, bias_g) + scale * F.linear(low, b_g.to(x.dtype)))
    return out


class Textbook(Contestant):
    """Naive LoRA, `W x + b + scale · B(A(dropout(x)))`, one linear at a time, as most hand-written code has it."""

    name = "textbook"

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        case = inputs.case
        drop = drop or _torch_dropout(case)
        return lambda x, layer, site: _naive(
            x, layer.weight, layer.bias, layer.a, layer.b, case.groups, case.scale, lambda x, group: drop(x, group, site)
        )


class Dense(Contestant):
    """The arithmetic of CLIP-LoRA's own code (arXiv 2405.18541): scale · B A built, and applied as a second product."""

    name = "dense ΔW"

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        case = inputs.case
        drop = drop or _torch_dropout(case)

        def forward(x: Tensor, layer: Layer, site: int) -> list[Tensor]:
            groups = zip(*(t.chunk(case.groups) for t in (layer.weight, layer.bias, layer.a, layer.b)), strict=True)
            out = []
            for group, (weight, bias, a, b) in enumerate(groups):
                delta = (case.scale * (b @ a[0])).to(x.dtype)
                out.append(F.linear(x, weight, bias) + F.linear(drop(x, group, site), delta))
            return out

        return forward


@functools.cache
def _compiled() -> Callable[..., list[Tensor]]:
    # without this a compiled backward cannot be timed apart, over one kept forward
    torch._functorch.config.donated_buffer = False
    # one compilation a case, all of one function; past the limit it would run uncompiled and be timed as if it were not
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True

    def naive(
        x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, groups: int, scale: float, p: float
    ) -> list[Tensor]:
        return _naive(x, weight, bias, a, b, groups, scale, lambda x, _: F.dropout(x, p, training=True) if p else x)

    return torch.compile(naive, dynamic=False)


class Compiled(Contestant):
    """torch.compile of the textbook. Its masks come from Inductor, so with dropout the gate checks it at p = 0."""

    name, compiles = "torch.compile(textbook)", True

    def missing(self, case: Case) -> str | None:
        return None if case.device.startswith("cuda") else "on a CPU each case takes half a minute to compile: --profile full"

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        case = inputs.case
        return lambda x, layer, site: _compiled()(
            x, layer.weight, layer.bias, layer.a, layer.b, case.groups, case.scale, case.dropout
        )


class _Masked(nn.Module):
    """Stands in for PEFT's dropout module in the gate."""

    def __init__(self, drop: Drop, group: int, site: int) -> None:
        super().__init__()
        self.drop, self.group, self.site = drop, group, site

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.group, self.site)


class Peft(Contestant):
    """PEFT's lora.Linear on separate q, k, v linears, with its default fp32 adapters beside a half-precision base."""

    name = "PEFT"

    def missing(self, case: Case) -> str | None:
        return None if importlib.util.find_spec("peft") else "peft is not installed: pip install peft"

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        from peft import LoraConfig, inject_adapter_in_model

        case = inputs.case
        config = LoraConfig(r=case.rank, lora_alpha=case.rank * case.scale, lora_dropout=case.dropout, target_modules=r"\d+")
        modules: list[nn.ModuleList] = []
        for site, layer in enumerate(inputs.layers):
            linears = nn.ModuleList()
            for weight, bias in zip(layer.weight.chunk(case.groups), layer.bias.chunk(case.groups), strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
                linear.weight, linear.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
                linears.append(linear)
            linears = inject_adapter_in_model(config, linears)
            for group, (linear, a, b) in enumerate(zip(linears, layer.a, layer.b.chunk(case.groups), strict=True)):
                linear.to(case.device)
                # the adapters of the set itself, so that gradients arrive where every contestant's do
                for child, value in ((linear.lora_A["default"], a), (linear.lora_B["default"], b)):
                    del child.weight
                    child.weight = value
                if drop is not None and case.dropout:
                    linear.lora_dropout["default"] = _Masked(drop, group, site)
                linear.train()
            modules.append(linears)
        return lambda x, layer, site: [linear(x) for linear in modules[site]]


CONTESTANTS: tuple[Contestant, ...] = (
    Frozen(), FastLoRA("triton"), FastLoRA("eager"), CublasBeta(), Textbook(), Dense(), Peft(), Compiled(), FullFineTuning()
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bound:
    """A contestant on one input set. wanted: what gets gradients, by name; dy as the outputs come, in one piece or by group."""

    run: Callable[[], list[Tensor]]
    wanted: dict[str, Tensor]
    dy: list[Tensor]

    def forward(self) -> list[Tensor]:
        """The outputs, with all that backward needs kept."""
        return self.run()

    def gradients(self, outputs: list[Tensor], keep: bool = False) -> tuple[Tensor, ...]:
        """The gradients of `wanted`, in its order."""
        return torch.autograd.grad(outputs, list(self.wanted.values()), self.dy, retain_graph=keep)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward."""
        return self.gradients(self.forward())


def bind(contestant: Contestant, inputs: InputSet, drop: Drop | None = None) -> Bound:
    """Tie a contestant to its own copies of x and the adapters of one input set (weights are shared)."""
    x = inputs.x.detach().requires_grad_()
    wanted = {"dx": x}
    layers = []
    for i, layer in enumerate(inputs.layers):
        trained = {"nothing": (), "adapters": ("a", "b"), "weights": ("weight", "bias")}[contestant.trains]
        leaves = {name: getattr(layer, name).detach().requires_grad_() for name in trained}
        layers.append(dataclasses.replace(layer, **leaves))
        wanted |= {f"d{name}{i}": leaf for name, leaf in leaves.items()}
    layer_forward = contestant.prepare(dataclasses.replace(inputs, layers=tuple(layers)), drop)

    def run() -> list[Tensor]:
        out = [x]
        for site, layer in enumerate(layers):
            out = layer_forward(F.gelu(out[0]) if site else out[0], layer, site)
        return out

    with torch.no_grad():
        pieces = len(run())
    dy = [piece.contiguous() for piece in inputs.dy.chunk(pieces, 1)]
    return Bound(run, wanted, dy)


class _Truth(Contestant):
    """fastlora.reference in the inputs' dtype, and the base layer alone where no adapter is trained."""

    def __init__(self, trains: str, eager: bool) -> None:
        self.trains, self.eager = trains, eager

    def prepare(self, inputs: InputSet, drop: Drop | None) -> LayerForward:
        case = inputs.case
        if self.trains != "adapters":
            return lambda x, layer, site: [F.linear(x, layer.weight, layer.bias)]
        if self.eager:
            return FastLoRA("eager").prepare(inputs, drop)
        groups = tuple(range(case.groups))

        def forward(x: Tensor, layer: Layer, site: int) -> list[Tensor]:
            spec = OpSpec(case.scale, case.dropout, site, groups, (True,) * case.groups)
            rows = torch.arange(len(x), device=x.device)
            return [reference.lora_linear(x, layer.weight, layer.bias, layer.a, layer.b, spec, inputs.seed, rows)]

        return forward


def _results(bound: Bound, groups: int) -> dict[str, Tensor]:
    """Outputs and gradients by name, each group apart, since the error budget holds per group."""
    outputs = bound.forward()
    values = dict(zip(bound.wanted, bound.gradients(outputs), strict=True))
    values["y"] = torch.cat([o.detach() for o in outputs], 1)
    apart = {"y": 1, **{name: 0 for name in values if name.startswith(("da", "db"))}}
    return {
        f"{name} group {i}" if name in apart and groups > 1 else name: part
        for name, value in values.items()
        for i, part in enumerate(value.chunk(groups, apart[name]) if name in apart else [value])
    }


@functools.lru_cache(maxsize=3)
def _expected(case: Case, trains: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(our algebra on torch's own products in the case's dtype, truth in fp64) of the gate's input set."""
    inputs = InputSet.draw(case, 0)
    # what is compiled in C errs less than torch's products: beside it they would not pass
    with mock.patch.object(thin, "serves", return_value=False):
        eager = _results(bind(_Truth(trains, eager=True), inputs), case.groups)
    doubled = tuple(Layer(*(t.double() for t in vars(layer).values())) for layer in inputs.layers)
    exact = dataclasses.replace(inputs, x=inputs.x.double(), dy=inputs.dy.double(), layers=doubled)
    return eager, _results(bind(_Truth(trains, eager=False), exact), case.groups)


def forget() -> None:
    """Let go of the truths that were kept for the contestants of the last cases."""
    _expected.cache_clear()


def gate(contestant: Contestant, case: Case) -> list[tuple[bool, str]]:
    """Outputs and gradients against the fp64 truth by the rule of fastlora.testing: for each whether it holds, and a line.

    With dropout, contestants that draw torch's masks are handed the library's mask, so that their arithmetic is checked too.
    """
    if isinstance(contestant, Compiled):
        case = dataclasses.replace(case, dropout=0.0)
    inputs = InputSet.draw(case, 0)
    drop = shared_mask(inputs) if case.dropout else None
    got = _results(bind(contestant, inputs, drop), case.groups)
    return budget_report(got, *_expected(case, contestant.trains), case.dtype)


def phase_calls(bounds: Sequence[Bound], phase: str) -> list[Callable[[], object]]:
    """The calls to time: "forward" keeps what backward needs, "backward" runs over one kept forward, "both" runs both."""
    if phase == "forward":
        return [bound.forward for bound in bounds]
    if phase == "both":
        return [bound.both for bound in bounds]
    return [functools.partial(bound.gradients, bound.forward(), keep=True) for bound in bounds]
