"""Which backend runs a call, and the reason why not a faster one.

Where this is "triton" without being asked for, fastlora.trust has the last word: eager serves where a kernel is wrong here.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor, nn

from . import fastest
from .kernels import tiles  # the table only: Triton itself is not imported

__all__ = ["choose", "describe", "measure"]

_KINDS = {"half": "half precision", "tf32": "tf32", "ieee": "float32 without tf32"}
log = logging.getLogger("fastlora")


def _triton_missing() -> str | None:
    """Why Triton cannot serve on this machine, or None."""
    return _look_for_triton()


def _measurements(device: torch.device, precision: tiles.Precision, rank: int, dropout: bool) -> tuple[tiles.Measured, ...]:
    """What was measured for a class of calls, fewest rows first; empty where nothing was."""
    return tiles.row_of(tiles.Call(tiles.architecture(device), precision, tiles.padded_rank(rank), dropout)).measured


# What is installed, and what the table says, does not change: nothing here for torch.compile to trace. This is what
# torch.compiler.assume_constant_result sets, without its import of torch._dynamo, a second at every `import fastlora`.
_triton_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
_measurements._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _look_for_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device"
    return None


def _refusal(x: Tensor, rank: int) -> str | None:
    """Why "triton" cannot run this call at all, or None."""
    if (missing := _triton_missing()) is not None:
        return missing
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"x is on {x.device.type}, triton needs a CUDA or ROCm device"
    if x.dtype == torch.float64:
        return "float64 has no tensor-core kernel"
    precision = tiles.precision_of(x.dtype)
    if rank > tiles.MAX_RANK[precision]:
        return f"rank {rank} is above {tiles.MAX_RANK[precision]}, the most in {_KINDS[precision]}"
    return None


def _worse(x: Tensor, rank: int, dropout: bool) -> str | None:
    """Why "eager" is the better choice where "triton" could run, or None."""
    if x.device.type != "cuda":
        return "Triton's interpreter is for tests"
    precision = tiles.precision_of(x.dtype)
    if precision == "ieee":
        return "float32 without tf32 runs on cuBLAS' plain units"
    if points := _measurements(x.device, precision, rank, dropout):
        # the largest measured that is not larger than the call, else the smallest
        rows = x.numel() // max(x.shape[-1], 1)
        point = next((p for p in reversed(points) if p.rows <= rows), points[0])
        if point.eager < point.triton:
            return f"measured faster: {point.eager:g} against {point.triton:g} µs at {point.rows} rows on {point.gpu}"
    return None


def choose(x: Tensor, rank: int, dropout: bool = False, forced: str | None = None) -> tuple[str, str]:
    """The backend for input x (..., K), a rank, and dropout on or off, and the reason in a few words.

    Args:
        forced: "triton", "eager" or "reference" to have exactly that one.

    Raises:
        RuntimeError: `forced` is "triton" and it cannot run this call; says why.
    """
    if forced is not None:
        if forced == "triton" and (refusal := _refusal(x, rank)) is not None:
            raise RuntimeError(f"backend 'triton' cannot run here: {refusal}; use backend='eager' or None")
        return forced, "asked for"
    reason = _refusal(x, rank) or _worse(x, rank, dropout)
    backend = "triton" if reason is None else "eager"
    reason = reason or "a GPU and Triton are there; eager for calls whose kernel is wrong or slower on this GPU"
    if not torch.compiler.is_compiling():
        _log_once(backend, reason)
    return backend, reason


@functools.cache
def _log_once(backend: str, reason: str) -> None:
    log.info("backend %r: %s", backend, reason)


def describe() -> dict[str, str]:
    """For each kind of device here the backend that half-precision calls get, with the reason; as `fastlora info` prints."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {d: "{}: {}".format(*choose(torch.empty(0, 1, dtype=torch.bfloat16, device=d), 2)) for d in devices}


def measure(model: nn.Module, rows: int = 6304) -> fastest.Measurements:
    """Time eager and the Triton plans for every class of adapted layers in a patched model, and use the fastest from then on.

    Each direction by itself, in the dtype of the weights or of an autocast that is on, with dropout where the model is in
    training mode. A plan is compared with eager first, by the rule of fastlora.budget. What is found is kept in the user's
    cache folder for this GPU, driver, torch, Triton and source of the kernels; this process and later ones use it for calls of
    these classes, whatever their rows, where `choose` gives "triton". Under torch.distributed all ranks must call; rank 0
    measures, and the others take its result, so that all round alike. Some minutes.

    Args:
        rows: of x in each timed call; 6304 are 32 images of a ViT-B/16.

    Raises:
        RuntimeError: there is no GPU here; no layer gets a Triton kernel (the model is on the CPU, say); a kernel left the
            GPU unusable; or rank 0 could not measure.
        ValueError: no adapter is active.
    """
    if (missing := _triton_missing()) is not None:
        raise RuntimeError(f"measure() times kernels on a GPU: {missing}")
    layers = fastest.layers(model)
    if not layers:
        raise ValueError("nothing to measure: the model has no active adapter, call fastlora.patch(model) first")
    served, left_out = [], []
    for layer in layers:
        x = torch.empty(1, layer.k, dtype=layer.dtype, device=layer.device).expand(rows, layer.k)
        chosen, reason = choose(x, layer.rank, layer.dropout)
        served += [layer] if chosen == "triton" else []
        left_out += [] if chosen == "triton" else [f"{layer.k}→{layer.n}, rank {layer.rank}: {chosen}: {reason}"]
    if not served:
        raise RuntimeError(f"nothing to measure, no layer gets a Triton kernel: {'; '.join(left_out)}")
    return fastest.measure(served, rows, tuple(left_out))
