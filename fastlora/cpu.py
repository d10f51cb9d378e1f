"""The CPU kernels, kernels/*.c: a plain C library, compiled when the package was installed, if there was a C compiler."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["available", "call", "lanes"]

# the arguments of each function, but for the last two: threads and floats in a vector
_ARGUMENTS = {
    "fastlora_thin": (
        c_void_p, c_int64, c_int64, c_int64,  # x, its row stride, m, k
        c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,  # a, s, ds, dx, da
        c_void_p, c_int64, c_int64,  # starts, g, r
        c_void_p, c_void_p, c_int64, c_int64, c_int, c_int, c_float,  # rows, groups, seed, site, j, planes, factor
    ),
    "fastlora_attend": (
        c_void_p, c_int64, c_void_p, c_void_p, c_int64,  # q, its row stride, k, v, theirs
        c_void_p, c_void_p, c_int64,  # out, dy, their row stride
        c_void_p, c_int64, c_void_p, c_void_p, c_int64,  # dq, its row stride, dk, dv, theirs
        c_int64, c_int64, c_int64, c_void_p, c_int64, c_int, c_int,  # heads, d, prefix, runs, their number, causal, pooled
    ),
}  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL | None:
    # beside the Triton kernels, without their package: it is a library, no Python module
    spec = importlib.util.find_spec("fastlora.kernels._cpu")
    if spec is None or spec.origin is None:
        return None
    return _load(spec.origin)


def _load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = [*arguments, c_int, c_int]
    library.fastlora_parallel.argtypes = [c_void_p]
    library.fastlora_parallel(_torchs_openmp())
    return library


def _torchs_openmp() -> c_void_p | None:
    """GOMP_parallel of the OpenMP that torch runs on; None where it runs on none, or on another one."""
    try:
        libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(libtorch.GOMP_parallel, c_void_p)
    except (OSError, AttributeError):
        return None


def available() -> bool:
    """Whether the kernels were compiled when the package was installed."""
    return _library() is not None


@functools.cache
def lanes(most: int | None = None) -> int:
    """How many floats a vector holds here: 16 with AVX-512, 8 with AVX2, else 4; at most `most`, or FASTLORA_LANES if None.

    Raises:
        RuntimeError: the kernels are not available.
        ValueError: FASTLORA_LANES is no such number.
    """
    library = _library()
    if library is None:
        raise RuntimeError("fastlora's CPU kernels were not compiled: install a C compiler, then fastlora again")
    if most is None:  # tests run at each width that the machine has
        asked = os.environ.get("FASTLORA_LANES", "16")
        if asked not in ("4", "8", "16"):
            raise ValueError(f"FASTLORA_LANES must be 4, 8 or 16, got {asked!r}")
        most = int(asked)
    return library.fastlora_lanes(most)


def call(name: str, *arguments: Any) -> None:
    """One call on torch's number of threads; tensors are passed by address, and live until it returns.

    Raises:
        MemoryError: the threads' own sums found no memory; nothing was written.
    """
    addresses = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
    threads = torch.get_num_threads()
    if getattr(_library(), name)(*addresses, threads, lanes()):
        raise MemoryError(f"no memory for what {threads} threads sum in {name}")
