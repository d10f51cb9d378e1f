"""The machine that predictions assume: an H100 as a few numbers, and the time of a product, a pass over memory, a kernel.

Two numbers were measured on such a card: 798 TFLOP/s in a bf16 product of 8192 x 8192 x 8192, and 3.0 TB/s in a copy, bytes
read and written. At 8192 x 8192 x 512 in fp16 users of Triton's tutorial on persistent products posted 553 TFLOP/s for cuBLAS
and 450 for its plain product on an H100. START, LOOP and TRITON are chosen so that `product` gives these three.
"""

from __future__ import annotations

import dataclasses
import math

MULTIPROCESSORS = 132
CLOCK = 1.83e9  # at which 132 multiprocessors of 4096 FLOP a clock are the data sheet's 989 TFLOP/s
COPY = 3.0e12  # bytes a second, read and written: measured
THIN = 2.0e12  # the same of a product with R columns: tiles of 64 columns nearly empty, long sums cut into pieces
L2 = 5120 * CLOCK  # bytes a second that all multiprocessors together read from it: 5120 a clock
LOOP = 848e12  # FLOP/s inside a tile of cuBLAS, once its pipeline is full
TRITON = 0.8  # of that, what Triton's loop reaches
NODE = 1.5  # microseconds from the last program of a kernel to the first useful one of the next, in a graph
# Eager PyTorch: host time of one kernel, forward, autograd and dispatch together; of one of ours, whose forty arguments
# Triton's launcher looks at in Python; of one of Inductor's, called from generated code.
HOST, HOST_TRITON, HOST_COMPILED = 6.0, 25.0, 3.0
# A tile's own beginning and end, in microseconds: its program starts and waits for its first copies (0.5 longer in Triton,
# which has no TMA here), then writes its sums at 1.2 for 128 x 256.
START, START_TRITON, STORE = 1.3, 1.8, 1.2 / (128 * 256)
COLUMNS = (256, 192, 128, 96, 64)  # tiles that cuBLAS has for 128 or 64 rows


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a row is expected to say: microseconds of forward and backward, bytes at the peak, and how these came about."""

    forward: float
    arithmetic: str
    backward: float = 0.0
    peak: float = 0.0

    @property
    def both(self) -> float:
        """Microseconds."""
        return self.forward + self.backward

    @property
    def milliseconds(self) -> float:
        """Of both."""
        return self.both / 1e3


@dataclasses.dataclass(frozen=True)
class Work:
    """What kernels have to do: microseconds of large products, bytes of passes and of thin products, number of kernels."""

    products: float = 0.0
    passes: float = 0.0
    thin: float = 0.0
    kernels: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, count: float) -> Work:
        """The same so many times."""
        return Work(*(count * value for value in dataclasses.astuple(self)))

    @property
    def busy(self) -> float:
        """Microseconds, without what lies between kernels."""
        return self.products + 1e6 * (self.passes / COPY + self.thin / THIN)

    @property
    def microseconds(self) -> float:
        """One kernel after another, in a graph."""
        return self.busy + NODE * self.kernels


def waves(tiles: float, resident: int = 1) -> int:
    """How often the multiprocessors are filled."""
    return math.ceil(tiles / (MULTIPROCESSORS * resident))


def _tile(flops: float, rate: float, start: float, area: int) -> tuple[float, float]:
    """(microseconds of the loop, of beginning and end) of one tile."""
    return 1e6 * flops / (rate / MULTIPROCESSORS), start + STORE * area


def _cublas(m: int, k: int, n: int) -> tuple[float, str]:
    found = []
    for rows in (128, 64):
        for columns in COLUMNS:
            area = rows * columns
            # two programs of a cluster share what both read
            rate = min(LOOP, L2 * area / min(rows + columns / 2, rows / 2 + columns))
            loop, ends = _tile(2 * area * k, rate, START, area)
            count = waves(math.ceil(m / rows) * math.ceil(n / columns))
            text = f"{count} {'wave' if count == 1 else 'waves'} of {rows}×{columns} × ({loop:.1f} + {ends:.1f} µs)"
            found.append((count * (loop + ends), text))
    return min(found)


def cublas(m: int, k: int, n: int) -> float:
    """Microseconds of (M, K) by (K, N) in 16 bits: waves of the tile that takes least, each its loop, beginning and end."""
    return _cublas(m, k, n)[0]


def long_sum(m: int, k: int, n: int) -> float:
    """Microseconds of dW = dyᵀ x: a sum over all M rows, cut into pieces so that all multiprocessors have work."""
    return 1e6 * 2 * m * k * n / (0.85 * LOOP) + START


def triton_tile(rows: int, columns: int, k: int) -> tuple[float, float]:
    """(microseconds of the loop over k, of beginning and end) of one tile of a Triton product.

    Its programs share nothing, so that small tiles are bound by the L2: 128x128 read 1 byte for 64 FLOP.
    """
    area = rows * columns
    rate = min(TRITON * LOOP, L2 * area / (rows + columns))
    return _tile(2 * area * k, rate, START_TRITON, area)


TRITON_TILES = ((128, 256), (128, 128), (64, 256), (64, 128))


def _triton(m: int, k: int, n: int) -> tuple[float, str]:
    found = []
    for rows, columns in TRITON_TILES:
        loop, ends = triton_tile(rows, columns, k)
        count = waves(math.ceil(m / rows) * math.ceil(n / columns))
        text = f"{count} {'wave' if count == 1 else 'waves'} of {rows}×{columns} × ({loop:.1f} + {ends:.1f} µs)"
        found.append((count * (loop + ends), text))
    return min(found)


def product(contestant: str, m: int, k: int, n: int) -> Expected:
    """A plain product (M, K) by (K, N) in a graph, by "cuBLAS" or the best tile of "Triton"; x Wᵀ and dy W alike."""
    time, text = {"cuBLAS": _cublas, "Triton": _triton}[contestant](m, k, n)
    return Expected(time + NODE, text)
