"""What one adapted layer is expected to take by each contestant of benchmarks/ops.py: packed q, k, v in bfloat16, in a graph.

A pass over memory is counted in sizes of x (2 M K bytes): what it reads and writes. The outputs of a group are as large as x.
A mask that torch keeps has a byte for an element: half a size.
"""

from __future__ import annotations

from typing import NamedTuple

from expected import ours
from expected.model import COPY, NODE, THIN, Expected, Work, cublas, long_sum
from shapes import Case


class Pass(NamedTuple):
    """One kernel over memory: sizes of x it reads and writes, how often it runs, whether it is a product with R columns.

    when: with "dropout" alone, "without" it alone, or "always".
    """

    what: str
    sizes: float
    runs: int = 3
    thin: bool = False
    when: str = "always"
    kernels: int | None = None


def _thin(what: str, sizes: float = 1, runs: int = 3, when: str = "always") -> Pass:
    return Pass(what, sizes, runs, True, when)


DROPOUT = Pass("dropout (x, x', mask)", 2.5, when="dropout")
DROPOUT_BACKWARD = Pass("dropout backward (dx', mask, dx)", 2.5, when="dropout")
SMALL = "A and B or their gradients cast"
SUMS = Pass("six parts of dx added up", 3, 5)
# (forward, backward) of each contestant, beside its large products
PASSES: dict[str, tuple[tuple[Pass, ...], tuple[Pass, ...]]] = {
    "frozen": ((), ()),
    # counted by a dispatch mode over fastlora.eager: masks are Philox in int64 tensors, drawn again in backward
    "fastlora eager": (
        (Pass("masks, x', s, y += s Bᵀ", 59, 1, when="dropout", kernels=185),
         Pass("s, y += s Bᵀ", 7.3, 1, when="without", kernels=7)),
        (Pass("ds, dB, masks, x', dA, dx +=", 78, 1, when="dropout", kernels=195),
         Pass("ds, dB, dA, dx +=", 9.5, 1, when="without", kernels=17)),
    ),
    "cuBLAS beta=1": (
        (Pass(SMALL, 0, 2), DROPOUT, _thin("s", when="dropout"), _thin("s", 1, 1, "without"), Pass("y += s Bᵀ", 2)),
        (_thin("ds"), _thin("dB"), Pass("x' again (x, mask, x')", 2.5, when="dropout"), _thin("dA", when="dropout"),
         _thin("dA", 1, 1, "without"), _thin("ds A", when="dropout"),
         Pass("dx += (ds A, mask, dx twice)", 3.5, when="dropout"), Pass("dx += ds A", 2, 1, when="without"),
         Pass(SMALL, 0, 4)),
    ),
    "textbook": (
        (Pass(SMALL, 0, 6), DROPOUT, _thin("s"), _thin("s Bᵀ"), Pass("· scale", 2), Pass("sum", 3)),
        (Pass("· scale", 2), _thin("ds"), _thin("dB"), _thin("dA"), _thin("ds A"), DROPOUT_BACKWARD, SUMS, Pass(SMALL, 0, 6)),
    ),
    "dense ΔW": (
        (Pass("ΔW: B A, scale, cast", 0, 9), DROPOUT, Pass("sum", 3)),
        (DROPOUT_BACKWARD, SUMS, Pass("dΔW to dA and dB", 0, 15)),
    ),
    "PEFT": (
        (Pass("x to fp32", 3), Pass("dropout in fp32", 4.5, when="dropout"), _thin("s", 2), _thin("s Bᵀ", 2),
         Pass("· scale", 4), Pass("sum in fp32", 5), Pass("to bf16", 3)),
        (Pass("dy to fp32", 3), Pass("and to bf16", 3), Pass("· scale", 4), _thin("ds", 2), _thin("dB", 2), _thin("dA", 2),
         _thin("ds A", 2), Pass("dropout backward in fp32", 4.5, when="dropout"), Pass("to bf16", 3), SUMS),
    ),
    "torch.compile(textbook)": (
        (Pass(SMALL, 0, 2), Pass("three x' and masks from one reading", 5.5, 1, when="dropout"), _thin("s"), _thin("s Bᵀ"),
         Pass("· scale and sum in one", 3)),
        (Pass("· scale", 2), _thin("ds"), _thin("dB"), _thin("dA"), _thin("ds A"),
         Pass("masks and sums of dx in one", 8.5, 1, when="dropout"), Pass("sums of dx in one", 7, 1, when="without"),
         Pass(SMALL, 0, 2)),
    ),
    "full fine-tuning": ((), (_thin("db, a sum over dy", 3, 1),)),
}  # fmt: skip
CONTESTANTS = ("frozen", "fastlora triton", *(name for name in PASSES if name != "frozen"))


def _products(case: Case, contestant: str) -> tuple[tuple[float, int], tuple[float, int]]:
    """(microseconds, kernels) of the large products, forward and backward."""
    m, k, n, g = case.m, case.k, case.n, case.groups
    if contestant in ("frozen", "fastlora eager", "cuBLAS beta=1"):
        return (cublas(m, k, n), 1), (cublas(m, n, k), 1)
    if contestant == "full fine-tuning":
        return (cublas(m, k, n), 1), (cublas(m, n, k) + long_sum(m, k, n), 2)
    apart = (g * cublas(m, k, n // g), g), (g * cublas(m, n // g, k), g)
    if contestant != "dense ΔW":
        return apart
    (f, _), (b, _) = apart
    return (2 * f, 2 * g), (2 * b + g * long_sum(m, k, n // g), 3 * g)


def _chosen(passes: tuple[Pass, ...], dropout: bool) -> list[Pass]:
    return [p for p in passes if p.when == "always" or (p.when == "dropout") == dropout]


def works(case: Case, contestant: str) -> tuple[Work, Work]:
    """Forward and backward as work, but for "fastlora triton", whose time is not made of passes."""
    found = []
    for (time, kernels), passes in zip(_products(case, contestant), PASSES[contestant], strict=True):
        chosen = _chosen(passes, case.dropout > 0)
        size = 2 * case.m * case.k
        plain, thin = (size * sum(p.sizes * p.runs for p in chosen if p.thin == kind) for kind in (False, True))
        kernels += sum(p.runs if p.kernels is None else p.kernels for p in chosen)
        found.append(Work(time, plain, thin, kernels))
    return found[0], found[1]


def words(work: Work, size: float) -> str:
    """The arithmetic of some work, in sizes of x."""
    parts = [f"products {work.products:.0f} µs"]
    for nbytes, speed, name in ((work.passes, COPY, "passes"), (work.thin, THIN, "thin products")):
        if nbytes:
            parts.append(f"{name} {nbytes / size:.3g} sizes of x at {speed / 1e12:.0f} TB/s {1e6 * nbytes / speed:.0f}")
    return " + ".join([*parts, f"{work.kernels:.0f} kernels {NODE * work.kernels:.0f}"])


def layer(case: Case, contestant: str) -> Expected:
    """Packed q, k, v, N = 3 K, by a contestant of benchmarks/ops.py."""
    if contestant == "fastlora triton":
        return ours.triton(case)
    forward, backward = works(case, contestant)
    text = ", ".join(p.what for passes in PASSES[contestant] for p in _chosen(passes, case.dropout > 0) if p.sizes)
    return Expected(
        forward.microseconds,
        words(forward + backward, 2 * case.m * case.k) + (f" ({text})" if text else ""),
        backward.microseconds,
    )
