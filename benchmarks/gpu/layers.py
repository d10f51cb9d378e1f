"""Parts b, f and g: one adapted layer of every contestant, gated and timed; h: whether its bits are still the first ones."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastlora.kernels import tiles
from fastlora.kernels.compile import Config
from measure import Timing, by_clock, by_events, by_graph, peak_memory, saved_bytes
from ops import CONTESTANTS, Contestant, FastLoRA, bind, gate, phase_calls
from shapes import Case, InputSet

from .ahead import needed, packed
from .items import Item, Row, at
from .run import Run

__all__ = ["bits_items", "config", "input_sets", "items"]

PHASES = ("forward", "backward", "both")
SAMPLE = 0.06  # seconds given to one measurement by one method: 50 to 200 calls at these shapes
# Calls of one item, forward and backward: its gate, the kernels' own check at first use, warm-up and 100 rounds a phase.
CALLS = 250
# Seconds of an item beside its samples at 50432 rows and at fewer: inputs, an fp64 truth, capture of three graphs.
SETUP = {"large": 0.7, "small": 0.35}
COMPILES = 15.0  # seconds that Inductor takes for forward and backward of one case
DIGEST = 0.6  # seconds for one case's outputs through a hash on the host, 0.6 GB at 50432 rows


def cases(rows: tuple[int, ...], device: str, smoke: bool) -> list[Case]:
    """Packed q, k, v of ViT-B (768) and ViT-L (1024); those with a target come first."""
    if smoke:
        return [Case("qkv", 20, 32, 96, 3, 2, p, torch.float32, device) for p in (0.25, 0.0)]
    return [
        Case("qkv", m, d, 3 * d, 3, rank, p, torch.bfloat16, device)
        for rank in (16, 2)
        for d in (768, 1024)
        for m in rows
        for p in (0.25, 0.0)
    ]


def config(case: Case, arch: int) -> Config:
    """A case's class of calls and shape."""
    assert (case.kind, case.n) == ("qkv", 3 * case.k)
    return packed(arch, case.dtype, case.m, case.k, case.rank, case.dropout, precision=tiles.precision_of(case.dtype))


def input_sets(case: Case, device: torch.device) -> list[InputSet]:
    """As many sets as together are three times the L2, so that none is still there when its turn comes again."""
    first = InputSet.draw(case, 1)
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, min(12, math.ceil(3 * cache / first.nbytes())))
    return [first, *(InputSet.draw(case, number) for number in range(2, count + 1))]


def items(part: str, rows: tuple[int, ...], arch: int, device: str, smoke: bool) -> list[Item]:
    """An item for every case and contestant of part b or f, or with Inductor of part g."""
    compiles = part == "g"
    found = []
    for case in cases(rows, device, smoke):
        # Inductor takes a quarter of a minute a case: those that have a target only
        if compiles and not smoke and (case.k, case.rank) != (768, 16):
            continue
        for contestant in CONTESTANTS:
            if contestant.compiles != compiles:
                continue
            ours = isinstance(contestant, FastLoRA) and contestant.backend == "triton"
            setup = at(case.m, SETUP) + COMPILES * compiles
            found.append(
                Item(
                    part,
                    f"{case.name}, {contestant.name}",
                    setup + 4 * SAMPLE,
                    functools.partial(measure, case, contestant),
                    needs=(needed(config(case, arch)),) if ours else (),
                    calls=CALLS if ours else 0,
                    about={"case": case.name, "contestant": contestant.name},
                )
            )
    return found


def _timings(run: Run, calls: list[Any], phase: str, stream: Any) -> Iterator[Timing]:
    if run.device.type != "cuda":
        yield by_clock(calls, run.device, 0.01, least=3)
        return
    if phase == "both":  # what a caller without a graph waits for
        yield by_events(calls, SAMPLE)
    yield by_graph(calls, stream, SAMPLE)


def measure(case: Case, contestant: Contestant, run: Run) -> Iterator[Row]:
    """The gate, then every phase; a refused contestant's row says why."""
    row: Row = {"row": "op", **case.row()}
    if (reason := contestant.missing(case)) is not None:
        yield row | {"skipped": reason}
        return
    if red := [line for ok, line in gate(contestant, case) if not ok]:
        yield row | {"refused": red}
        return
    sets = run.keep(case, functools.partial(input_sets, case, run.device))
    stream = torch.cuda.Stream() if run.device.type == "cuda" else None
    if stream is not None:
        torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        bounds = [bind(contestant, inputs) for inputs in sets]
        weights = [t for layer in sets[0].layers for t in vars(layer).values()]
        row |= {"sets": len(sets), "saved_bytes": saved_bytes(bounds[0].forward, weights)}
        with peak_memory(run.device) as peak:
            bounds[0].both()
        row |= peak
        for phase in PHASES:
            flops, nbytes = case.work(phase)
            for timing in _timings(run, phase_calls(bounds, phase), phase, stream):
                yield (
                    row
                    | {"phase": phase}
                    | timing.row()
                    | {
                        "tflops": flops / timing.median / 1e12,
                        "gbps": nbytes / timing.median / 1e9,
                        "share_of_roofline": run.ceilings().seconds(flops, nbytes) / timing.median,
                    }
                )


def digests(case: Case) -> dict[str, str]:
    """A hash of the bits of each result of the kernels: y and all gradients, on inputs that are the same each time."""
    bound = bind(FastLoRA("triton" if case.device.startswith("cuda") else "eager"), InputSet.draw(case, 1))
    outputs = bound.forward()
    results = {f"y{i}": y for i, y in enumerate(outputs)} | dict(zip(bound.wanted, bound.gradients(outputs), strict=True))
    return {name: _digest(value.detach()) for name, value in results.items()}


def _digest(value: Tensor) -> str:
    return hashlib.blake2b(value.contiguous().cpu().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def bits_items(part: str, rows: tuple[int, ...], arch: int, device: str, smoke: bool) -> list[Item]:
    """An item for every case at rank 16: in part a the first bits, in part h the same calls again, after everything else."""
    return [
        Item(
            part,
            f"bits of {case.name}",
            DIGEST,
            functools.partial(compare_bits, case),
            needs=(needed(config(case, arch)),),
            calls=2,
            about={"case": case.name, "contestant": "fastlora triton"},
        )
        for case in cases(rows, device, smoke)
        if case.rank == 16 or smoke
    ]


def compare_bits(case: Case, run: Run) -> Iterable[Row]:
    """The bits of one case's results; refused where they differ from the first that any process found."""
    found = digests(case)
    first = run.history.first_bits.get(case.name)
    row: Row = {"row": "bits", "bits": found}
    if first is not None:
        moved = [name for name, value in found.items() if first["bits"].get(name) != value]
        row |= {"same": not moved} | ({"refused": [f"{name} has other bits than at first" for name in moved]} if moved else {})
    yield row
