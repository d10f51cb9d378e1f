"""Whether attention over packed rows is right on the kernels of a GPU: torch's varlen attention, and xformers'."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastlora.budget import Maxima
from fastlora.encoders import attention as ours
from fastlora.encoders.packing import Sequences

__all__ = ["attention", "missing"]

_MODULES = {"varlen": "torch.nn.attention.varlen", "xformers": "xformers.ops"}


def missing(kernel: str, device: torch.device) -> str | None:
    """Why "varlen" or "xformers" cannot run in half precision on a device, or None."""
    if device.type != "cuda":
        return f"{kernel} needs a GPU"
    try:
        found = importlib.util.find_spec(_MODULES[kernel])
    except ModuleNotFoundError:  # the package that it would be in
        found = None
    if not found:
        return f"{_MODULES[kernel]} is not installed"
    if kernel == "xformers" and not ours._xformers_runs(device, torch.float16):
        return f"xformers refuses this GPU: it was built for another CUDA than torch {torch.__version__}, or for other GPUs"
    return None


@dataclasses.dataclass(frozen=True)
class _Case:
    name: str
    heads: int
    runs: tuple[tuple[int, int], ...]
    causal: bool
    prefix: int = 0
    pooled: bool = False

    def sequences(self, device: torch.device) -> Sequences:
        lengths = [length for count, length in self.runs for _ in range(count)]
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return Sequences(self.runs, self.causal, self.prefix, 0, offsets)


def _cases(prompts: int, images: int, tokens: int, prefix: int, heads: tuple[int, int]) -> list[_Case]:
    lengths = [8 + i % 11 for i in range(prompts)]
    text = tuple((lengths.count(length), length) for length in sorted(set(lengths)))
    own = tuple((count, length - prefix) for count, length in text)
    # two runs of one length: sequences of one run go to sdpa whatever the kernel
    pictures = ((images - 1, tokens), (1, tokens))
    return [
        _Case(f"{name}{', pooled' if pooled else ''}", of, runs, causal, first, pooled)
        for name, of, runs, causal, first in (
            ("prompts", heads[0], text, True, 0),
            ("prompts with a shared prefix", heads[0], own, True, prefix),
            ("images", heads[1], pictures, False, 0),
        )
        for pooled in (False, True)
    ]


def attention(
    device: torch.device, kernel: str, dtype: torch.dtype, *, prompts: int = 100, images: int = 32, tokens: int = 197,
    prefix: int = 5, heads: tuple[int, int] = (8, 12), head: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """`attend` and `attend_pooled` forced to a kernel, forward and gradients, are within the rule of fastlora.budget.

    The truth is scaled_dot_product_attention in float64, eager the same in `dtype`.

    Args:
        kernel: "varlen" or "xformers"; "sdpa" or "cpu" on a CPU.
        prompts: causal, of 8 to 18 tokens in turn, with and without a shared prefix of `prefix` of them.
        images: of `tokens` each, not causal; at least 2.
        heads: of text and images, each `head` wide.
    """
    facts: dict[str, float] = {}
    for case in _cases(prompts, images, tokens, prefix, heads):
        rows = case.sequences(device)
        drawn = _drawn(case, head, dtype, device)
        maxima = Maxima()
        with _forced(kernel, case.name):
            got = _results(drawn, dtype, case.heads, rows)
        with _forced("sdpa", case.name):
            eager, truth = (_results(drawn, of, case.heads, rows) for of in (dtype, torch.float64))
        maxima.add(got, eager, truth)
        numbers = maxima.read()
        red = [f"{name}: {n.words(dtype)}" for name, n in numbers.items() if not n.ok(dtype)]
        assert not red, f"{kernel} attention in {dtype} is wrong over {case.name}: {'; '.join(red)}"
        facts[case.name] = round(max(n.share(dtype) for n in numbers.values()), 3)
    return {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "shares": facts}


@contextlib.contextmanager
def _forced(kernel: str, name: str) -> Iterator[None]:
    """Within it `kernel` computes attention.

    Raises:
        AssertionError: it was not asked: what is compared would be another one's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ours, "kernel", lambda x: kernel))
        function = f"_{kernel}"
        asked = None
        if kernel in _MODULES:
            asked = stack.enter_context(mock.patch.object(ours, function, wraps=getattr(ours, function)))
        yield
        assert asked is None or asked.called, f"{kernel} attention was never asked over {name}"


def _drawn(case: _Case, head: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Inputs of order 1 that `dtype` holds, and last what backward begins with."""
    generator = torch.Generator(device).manual_seed(0)
    rows, width = case.sequences(device), case.heads * head
    body, queries = rows.prefix + rows.body, rows.count
    shapes = [(queries, width), (body, 2 * width), (queries, width)] if case.pooled else [(body, 3 * width), (body, width)]
    return [torch.randn(*shape, generator=generator, device=device).to(dtype) for shape in shapes]


def _results(drawn: list[Tensor], dtype: torch.dtype, heads: int, rows: Sequences) -> dict[str, Tensor]:
    """y and the gradients of q, k and v. drawn: as `_drawn` gives it."""
    *inputs, dy = (t.to(dtype, copy=True) for t in drawn)
    leaves = [t.requires_grad_() for t in inputs]
    if len(leaves) == 2:
        y = ours.attend_pooled(leaves[0], leaves[1], heads, rows)
        dq, dkv = torch.autograd.grad(y, leaves, dy)
        dk, dv = dkv.chunk(2, 1)
    else:
        y = ours.attend(leaves[0], heads, rows)
        dq, dk, dv = torch.autograd.grad(y, leaves, dy)[0].chunk(3, 1)
    return {"y": y.detach(), "dq": dq, "dk": dk, "dv": dv}
