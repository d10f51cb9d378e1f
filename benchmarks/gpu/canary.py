"""Part a, the canary: whether the kernels are right on this GPU, before any time is spent on how fast they are.

The most telling first. Kernels are compiled meanwhile, so what needs none comes before them. Every item ends with a row that
says what was compared; one that is wrong says `refused`, and names the form that is red and the one that serves in its place.
Of classes of float32 it is `noted` alone: they are not what is measured, and the library answers them by eager then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fastlora import verdicts

from .ahead import needed, packed, tower
from .attention_checks import attention, missing
from .checks import TableRow, judged, mask_bits, replays, table_rows
from .items import Item, Needed, Row, at
from .layers import bits_items
from .run import Run
from .step_check import captured_step
from .suite import suite_items

__all__ = ["items"]

ROWS = (50432, 6304)  # 256 images of 197 tokens, and 32
# Expected seconds of one item: with an fp64 truth, at 50432 rows and at fewer; masks, graphs, attention, a step.
JUDGED = {"large": 0.8, "small": 0.3}
MASK, REPLAYS, ATTENTION, STEP = 1.5, 1.0, 2.5, 6.0
TESTS = 45.0  # the tests marked gpu that are quick: most of it is compiling their small tiles


def items(arch: int, device: str, smoke: bool) -> list[Item]:
    """Every check, in order of worth: float32, which is not what is measured, comes last."""
    rows, width = ((20,), 40) if smoke else (ROWS, 768)
    half = torch.float16 if smoke else torch.bfloat16  # the interpreter does not know bfloat16
    found = [
        _check(f"attention, {kernel}, {_short(dtype)}", ATTENTION, functools.partial(_attention, kernel, dtype, smoke))
        for kernel, dtype in _attention_kinds(device)
    ]
    table = [row for m in rows for row in _table(device, m, width, smoke)]
    table += [] if smoke else [row for k in (512, 1024) for row in _table(device, rows[-1], k, smoke, ranks=(2, 16))]
    table.sort(key=lambda row: row.layer.rank > 16 or row.layer.k != width)  # the paper's class first, at both sizes
    found += [_table_item(row, arch) for row in table if row.precision == "half"]
    for rate in (0.25, 0.1):
        check = functools.partial(mask_bits, m=rows[-1], k=width, dtype=half, dropout=rate)
        config = packed(arch, half, rows[-1], width, 16, rate, identities=True)
        found.append(
            _check(f"every bit of the mask, p={rate:g}", MASK, functools.partial(_facts, check), (needed(config),), 90)
        )
    for m in rows:
        check = functools.partial(replays, m=m, k=width, times=1 if smoke else 20, dtype=half)
        needs = (needed(packed(arch, half, m, width, 16, 0.25)),)
        found.append(_check(f"20 graph replays, {m} rows", REPLAYS, functools.partial(_facts, check), needs, 25))
    step = () if smoke else _mini_step(arch)
    found.append(
        _check("one captured training step", STEP, functools.partial(_facts, functools.partial(_step, smoke)), step, 9)
    )
    found += bits_items("a", ROWS, arch, device, smoke)
    found += [_table_item(row, arch) for row in table if row.precision != "half" and row.layer.k == width]
    return found + ([] if smoke else suite_items("a", "gpu and not slow", TESTS))


def _mini_step(arch: int) -> tuple[Needed, ...]:
    """What `captured_step` starts: the mini CLIP's towers, 8 images of 65 tokens and 4 prompts of 30 together, rank 4."""
    image = packed(arch, torch.bfloat16, 520, 192, 4, 0.25, identities=True)
    text = packed(arch, torch.bfloat16, 30, 64, 4, 0.25, identities=True)
    return (*tower(image, 8), *tower(text, 4))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    name: str, seconds: float, work: Callable[[Run], Iterable[Row]], needs: tuple[Needed, ...] = (), calls: int = 0
) -> Item:
    return Item("a", name, seconds, work, needs=needs, calls=calls, about={"case": name, "contestant": "fastlora triton"})


def _facts(check: Callable[..., dict[str, Any]], run: Run) -> Iterator[Row]:
    """The row of a check: its facts, or what it found wrong."""
    try:
        yield {"row": "check", **check(run.device)}
    except AssertionError as error:
        yield {"row": "check", "refused": [str(error)]}


def _attention_kinds(device: str) -> list[tuple[str, torch.dtype]]:
    if device == "cpu":
        return [("cpu", torch.float32), ("sdpa", torch.float32)]
    return [("varlen", torch.bfloat16), ("xformers", torch.bfloat16), ("varlen", torch.float16), ("xformers", torch.float16)]


def _attention(kernel: str, dtype: torch.dtype, smoke: bool, run: Run) -> Iterator[Row]:
    if run.device.type == "cuda" and (reason := _why_not(kernel, run.device)) is not None:
        yield {"row": "check", "skipped": reason}
        return
    sizes: dict[str, Any] = {"prompts": 6, "images": 2, "tokens": 5, "prefix": 2, "heads": (2, 2), "head": 8} if smoke else {}
    yield from _facts(functools.partial(attention, kernel=kernel, dtype=dtype, **sizes), run)


def _why_not(kernel: str, device: torch.device) -> str | None:
    try:
        return missing(kernel, device)
    except Exception as error:  # a package built for another torch raises whatever it likes
        return f"{kernel} cannot be asked: {error!r}"[:300]


def _step(smoke: bool, device: torch.device) -> dict[str, Any]:
    return captured_step(device, steps=2, batch=2) if smoke else captured_step(device, dtype=torch.bfloat16)


def _table(device: str, m: int, k: int, smoke: bool, ranks: tuple[int, ...] = (2, 16, 32, 64, 128)) -> list[TableRow]:
    if smoke:  # without a GPU: an interpreted product takes a second
        return table_rows(torch.device(device), m, k, dtypes=(torch.float16,), ranks=(16,))
    return table_rows(torch.device(device, 0), m, k, ranks=ranks)


def _table_item(row: TableRow, arch: int) -> Item:
    layer = row.layer
    config = packed(arch, layer.dtype, row.m, layer.k, layer.rank, layer.spec.dropout, precision=row.precision)
    name = f"table, {row.name}, {row.m} rows, width {layer.k}"
    return _check(name, at(row.m, JUDGED), functools.partial(_judge, row), (needed(config),), 2)


def _judge(row: TableRow, run: Run) -> Iterator[Row]:
    """Forward and backward of one class by the error rule; where the table's plan is red, the next best and both are named."""
    book = verdicts.book(run.device) if run.device.type == "cuda" else _book_of_no_gpu()
    wrong = "refused" if row.precision == "half" else "noted"
    for call in row.calls():
        about: Row = {"row": "check", "direction": call.kind.direction}
        try:
            found = judged(call, book)
            yield about | found.facts() | ({} if found.right else {wrong: [str(found)]})
        except AssertionError as error:
            yield about | {wrong: [str(error)]}


@functools.cache
def _book_of_no_gpu() -> verdicts.Book:
    """A book that nothing is written into: a smoke run judges the interpreter."""
    return verdicts.Book(verdicts.Key("no GPU", "none", torch.__version__, "interpreter", verdicts.source()))
