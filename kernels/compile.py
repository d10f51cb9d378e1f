"""Compiles every kernel of the tile table for sm_80, sm_90 and sm_100, without a GPU: `make kernels`.

    python -m fastlora.kernels.compile [--arch 90] [--precision half] [--rank 16] [--list | --rows FILE]

The launchers run on "meta" tensors under `launch.recording`, so what is compiled is what is launched, for every combination of
gradients that can be asked for. A row of the printed table is one kernel in one configuration; the exit status is 1 where one
breaks the rules of `Report.problems`. What was compiled once is read back from a folder beside Triton's own cache, so a run
that was stopped goes on where it was. --list compiles nothing: it prints which kernels each class of calls launches, in order.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlora.config import OpSpec

from . import lora_linear, machine_code, races, tiles
from .candidates import candidates
from .launch import Launch, recording
from .machine_code import Report

__all__ = ["Config", "Job", "ast_source", "compile_launch", "configurations", "jobs", "launch_table", "launches"]

# What is compiled stands for these GPUs: A100, H100 and H200, B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# Gradients of x, A and B: each combination that a backward can be asked for, all of them first.
Needs: TypeAlias = tuple[bool, bool, bool]
NEEDS: list[Needs] = [(x, a, b) for x, a, b in itertools.product((True, False), repeat=3) if x or a or b]
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}


@dataclasses.dataclass(frozen=True)
class Config:
    """A class of calls with a shape that stands for it: packed q, k, v, width 768, batch 256 of ViT-B/16.

    rank: R, where it is not the padded one. A size of 1 is a constant in what Triton compiles.
    identities: whether rows have identities of their own under dropout, as prompts have.
    groups: what keys the masks of the groups; None for 0, 1, 2.
    dropout: the rate, where the class drops out.
    """

    call: tiles.Call
    dtype: torch.dtype
    active: tuple[bool, ...] = (True, True, True)
    width: int = 768
    rows: int = 50432
    rank: int | None = None
    identities: bool = False
    groups: tuple[int, ...] | None = None
    dropout: float = 0.25

    def __str__(self) -> str:
        c = self.call
        return f"sm_{c.arch} {str(self.dtype).split('.')[1]} {c.precision} r{c.rank} p={self.dropout if c.dropout else 0.0}"


def configurations(archs: tuple[int, ...] = tiles.ARCHITECTURES) -> list[Config]:
    """One Config for each row of the tile table."""
    dtypes: dict[tiles.Precision, torch.dtype] = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
    return [
        Config(tiles.Call(arch, precision, rank, dropout), dtypes[precision])
        for arch, precision, rank, dropout in itertools.product(archs, dtypes, (16, 32, 64, 128), (False, True))
        if rank <= tiles.MAX_RANK[precision]
    ]


def launches(config: Config, plan: tiles.Plan | None = None, needs: Needs = NEEDS[0]) -> tuple[list[Launch], list[Launch]]:
    """What forward and what backward start for a configuration, in order. needs: gradients of x, A and B."""
    call, g = config.call, sum(config.active)
    m, k, n, rank = config.rows, config.width, config.width * len(config.active), config.rank or call.rank
    plan = plan or tiles.choose(call)

    def empty(*shape: int, dtype: torch.dtype = config.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    a, b = empty(g, rank, k, dtype=torch.float32), empty(n * g // len(config.active), rank, dtype=torch.float32)
    x, weight = empty(m, k), empty(n, k)
    groups = config.groups or tuple(range(len(config.active)))
    spec = OpSpec(0.5, config.dropout if call.dropout else 0.0, 1, groups, config.active)
    seed = empty(1, dtype=torch.int64) if call.dropout else None
    identities = empty(m, dtype=torch.int64) if config.identities else None
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = call.precision == "tf32"
    try:
        with tiles.assuming(MULTIPROCESSORS[call.arch]):
            with recording() as forward:
                _, s = lora_linear.forward(x, weight, empty(n), a, b, spec, seed, identities, plan=plan)
            with recording() as backward:
                lora_linear.backward(empty(m, n), x, s, weight, a, b, spec, seed, identities, needs, plan=plan)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return forward, backward


def ast_source(launch: Launch) -> ASTSource:
    """What Triton's launcher would specialise the kernel on: alignment to 16, the value 1 and None."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        whole = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if whole and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


@functools.cache
def _reader() -> str:
    """What the reports depend on beside a kernel: the compiler and the code that reads its output."""
    return triton.__version__ + inspect.getsource(machine_code) + inspect.getsource(races)


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile one launch for sm_{arch} and read its machine code, or read back what an earlier run found.

    Needs no GPU, but Triton without its interpreter.
    """
    source = ast_source(launch)
    key = hashlib.sha256(f"{source.hash()}-{arch}-{launch.warps}-{launch.stages}-{_reader()}".encode()).hexdigest()
    kept = Path(triton.knobs.cache.dir, "fastlora", f"{key}.json")
    if kept.exists():
        return Report(**json.loads(kept.read_text()))
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    # the time is wanted too, so nothing comes from Triton's cache
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        before = os.times()
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        # user and system time of this process and of the ptxas it waited for
        cpu_seconds = sum(os.times()[:4]) - sum(before[:4])
    report = machine_code.read(compiled, arch, cpu_seconds)
    kept.parent.mkdir(parents=True, exist_ok=True)
    whole = kept.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(dataclasses.asdict(report)))
    whole.replace(kept)
    return report


@dataclasses.dataclass(frozen=True)
class Job:
    """One launch of one configuration, by its number: a worker makes the launch itself."""

    config: Config
    plan: tiles.Plan
    needs: Needs
    number: int

    @property
    def launch(self) -> Launch:
        return _every_launch(self.config, self.plan, self.needs)[self.number]

    def row(self) -> dict[str, Any]:
        """Compile it: the report, what was compiled, and the problems."""
        launch, call = self.launch, self.config.call
        report = compile_launch(launch, call.arch)
        measured = bool(tiles.row_of(call).measured)
        tensor_cores = launch.arguments.get("PRECISION", "ieee") != "ieee"
        blocks = "x".join(str(launch.arguments[f"BLOCK_{d}"]) for d in "MNK" if f"BLOCK_{d}" in launch.arguments)
        return {
            "kernel": launch.kernel.__name__,
            "class": str(self.config),
            "tile": f"{blocks or launch.arguments.get('BLOCK')} {launch.warps}w {launch.stages}s",
            **dataclasses.asdict(report),
            "problems": report.problems(call.arch, tensor_cores, measured),
        }


def _every_launch(config: Config, plan: tiles.Plan, needs: Needs) -> list[Launch]:
    forward, backward = launches(config, plan, needs)
    return forward + backward


def _plans(call: tiles.Call, every: bool) -> list[tiles.Plan]:
    return [*candidates(call, "forward"), *candidates(call, "backward")] if every else [tiles.choose(call)]


def jobs(configs: list[Config], every: bool = False) -> Iterator[Job]:
    """Every launch of the configurations that differs from all before it, whichever gradients are asked for.

    every: of all plans that `fastlora.backend.measure` tries, not of the table's rows alone.
    """
    seen = set()
    for config in configs:
        for plan, needs in itertools.product(_plans(config.call, every), NEEDS):
            for number, launch in enumerate(_every_launch(config, plan, needs)):
                key = (config.call.arch, launch.warps, launch.stages, ast_source(launch).hash())
                if key not in seen:
                    seen.add(key)
                    yield Job(config, plan, needs, number)


def launch_table(configs: list[Config]) -> list[tuple[str, str, str]]:
    """(class, kernels of forward, kernels of backward) of each configuration, in the order of their launches.

    Packed q, k, v with float32 adapters beside a half-precision base, as `fastlora.patch` makes them, and all gradients.
    """
    rows = []
    for config in configs:
        forward, backward = (
            ", ".join(one.kernel.__name__.removesuffix("_kernel") for one in some) for some in launches(config)
        )
        rows.append((str(config), forward, backward))
    return rows


def launch_markdown() -> str:
    """The table of README.md: which classes of calls launch the same kernels."""
    alike: dict[tuple[str, str], dict[str, dict[int, list[str]]]] = {}
    configs = configurations()
    for config, (_, forward, backward) in zip(configs, launch_table(configs), strict=True):
        call = config.call
        ranks = alike.setdefault((forward, backward), {}).setdefault(f"sm_{call.arch} {call.precision}", {})
        ranks.setdefault(call.rank, []).append("p > 0" if call.dropout else "p = 0")
    lines = ["| forward | backward | classes |", "|---|---|---|"]
    for (forward, backward), classes in alike.items():
        # a rank whose calls launch the same with dropout and without is named alone
        cells = [
            f"{name} " + ", ".join(f"r{rank}" if len(rates) == 2 else f"r{rank} {rates[0]}" for rank, rates in ranks.items())
            for name, ranks in classes.items()
        ]
        lines.append(f"| {forward} | {backward} | {'; '.join(cells)} |")
    return "\n".join(lines)


def markdown(*files: list[dict[str, Any]]) -> str:
    """The table of README.md from rows that --rows writes: Hopper's kernels of small rank in the first file, a line on each.

    Of a kernel that differs with the gradients asked for, the form for all of them, which comes first.
    """
    columns: tuple[str, ...] = ("kernel", "class", "tile", "registers", "stack", "shared", "mma", "wgmma", "loop", "load")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    seen = {("pack_kernel", "r16 p=0.0"), ("reduce_kernel", "r16 p=0.0")}
    for row in files[0][1:]:
        name = (row["kernel"], row["class"].removeprefix("sm_90 bfloat16 half "))
        if name[1].startswith("r16 ") and name not in seen:
            seen.add(name)
            lines.append("| " + " | ".join(str(row[c]).removeprefix("sm_90 bfloat16 half ") for c in columns) + " |")
    for head, *found in files:
        lines.append(
            f"\nTriton {head['triton']}, the whole table for sm_80, sm_90 and sm_100: {len(found)} kernels, "
            f"{sum(bool(row['problems']) for row in found)} with problems, "
            f"at most {max(row['stack'] for row in found)} bytes of stack, "
            f"{sum(row['spills_in_loops'] for row in found)} spills in loops with products, "
            f"{sum(row['cpu_seconds'] for row in found):.0f} CPU seconds of compiling."
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile what the options select, print one row a kernel and the problems; 1 where there are any."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Compile the kernels of the tile table without a GPU.")
    parser.add_argument("--arch", type=int, choices=tiles.ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--precision", choices=("half", "tf32", "ieee"), help="default: all")
    parser.add_argument("--rank", type=int, choices=(16, 32, 64, 128), help="padded rank; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--rows", type=Path, help="write the rows to this file too, one JSON object a line")
    parser.add_argument("--candidates", action="store_true", help="every plan that fastlora.backend.measure tries, too")
    parser.add_argument("--list", action="store_true", help="only print which kernels each class of calls launches")
    options = parser.parse_args(arguments)
    if not options.list and os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    configs = [
        c for c in configurations(tuple(options.arch or tiles.ARCHITECTURES))
        if options.precision in (None, c.call.precision) and options.rank in (None, c.call.rank)
    ]  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 200)
    if options.list:
        table = Table("class of calls", "forward", "backward", title="Kernels, in the order of their launches")
        for line in launch_table(configs):
            table.add_row(*line)
        console.print(table)
        return 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(Job.row, jobs(configs, options.candidates)))
    columns: tuple[str, ...] = ("kernel", "class", "tile", "registers", "stack", "shared", "mma", "wgmma", "loop", "load")
    columns += ("races", "cpu_seconds", "problems")
    table = Table(*columns)
    for row in rows:
        shown = row | {"races": len(row["races"]), "problems": "; ".join(row["problems"])}
        table.add_row(*(str(shown[c]) for c in columns))
    console.print(table)
    failed = sum(bool(row["problems"]) for row in rows)
    console.print(f"Triton {triton.__version__}: {len(rows)} kernels compiled, {failed} with problems")
    if options.rows:
        header = {"row": "run", "triton": triton.__version__, "torch": torch.__version__}
        options.rows.write_text("".join(json.dumps(row) + "\n" for row in (header, *rows)))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
