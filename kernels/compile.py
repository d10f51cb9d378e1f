"""Compiles every kernel of the tile table for sm_80, sm_90 and sm_100, without a GPU: `make kernels`.

    python -m fastlora.kernels.compile [--arch 90] [--precision half] [--rank 16]

The launchers run on "meta" tensors under `launch.recording`, so what is compiled is what is launched. A row of the printed
table is one kernel in one configuration; the exit status is 1 where one breaks the rules of `Report.problems`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastlora.config import OpSpec

from . import lora_linear, tiles
from .launch import Launch, recording

__all__ = ["Config", "Report", "compile_launch", "configurations", "launches"]

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
# Shared memory one program may have, in bytes: CUDA C++ Programming Guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# More than this without a measured time is refused: a few spilled addresses outside of the loops cost nothing, tiles do.
STACK_LIMIT = 64
# A compiled loop: from a label to a branch back to it. MMA: mma.sync, wgmma, tcgen05.
MMA = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")


@dataclasses.dataclass(frozen=True)
class Config:
    """A class of calls with a shape that stands for it: packed q, k, v, width 768, batch 256 of ViT-B/16."""

    call: tiles.Call
    dtype: torch.dtype
    active: tuple[bool, ...] = (True, True, True)
    width: int = 768

    def __str__(self) -> str:
        c = self.call
        return f"sm_{c.arch} {str(self.dtype).split('.')[1]} {c.precision} r{c.rank} p={0.25 if c.dropout else 0.0}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one launch. Bytes for stack and shared memory, seconds for compiling."""

    config: str
    kernel: str
    tile: str
    arch: int
    registers: int
    stack: int
    shared: int
    mma: int
    wgmma: int
    seconds: float
    spills_in_loops: int
    serialised: str
    uses_tensor_cores: bool
    measured: bool

    def problems(self) -> list[str]:
        """Why this configuration must not be used; empty where it may."""
        found = []
        if self.spills_in_loops:
            found.append(f"{self.spills_in_loops} local loads or stores inside an MMA loop")
        if self.serialised:
            found.append(self.serialised)
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_LIMIT[self.arch]}")
        if self.uses_tensor_cores and not self.mma:
            found.append("tensor cores lost")
        if self.stack > STACK_LIMIT and not self.measured:
            found.append(f"{self.stack} bytes of stack and no measured time")
        return found


def configurations(archs: tuple[int, ...] = tiles.ARCHITECTURES) -> list[Config]:
    """One Config for each row of the tile table."""
    dtypes: dict[tiles.Precision, torch.dtype] = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
    return [
        Config(tiles.Call(arch, precision, rank, dropout), dtypes[precision])
        for arch, precision, rank, dropout in itertools.product(archs, dtypes, (16, 32, 64, 128), (False, True))
        if rank <= {"half": 128, "tf32": 64, "ieee": 32}[precision]
    ]


def launches(config: Config, plan: tiles.Plan | None = None) -> list[Launch]:
    """The kernels that forward and backward start for a configuration."""
    call, g = config.call, sum(config.active)
    m, k, n = 50432, config.width, config.width * len(config.active)
    plan = plan or tiles.choose(call)

    def empty(*shape: int, dtype: torch.dtype = config.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    a, b = empty(g, call.rank, k, dtype=torch.float32), empty(n * g // len(config.active), call.rank, dtype=torch.float32)
    x, weight = empty(m, k), empty(n, k)
    groups = tuple(range(len(config.active)))
    spec = OpSpec(0.5, 0.25 if call.dropout else 0.0, 1, groups, config.active)
    seed = empty(1, dtype=torch.int64) if call.dropout else None
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = call.precision == "tf32"
    try:
        with recording() as recorded:
            _, s = lora_linear.forward(x, weight, empty(n), a, b, spec, seed, None, plan=plan)
            lora_linear.backward(empty(m, n), x, s, weight, a, b, spec, seed, None, (True, True, True), plan=plan)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return recorded


def _source(launch: Launch) -> ASTSource:
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
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _loops(sass: str) -> list[list[str]]:
    """The innermost loops of a disassembly, each as its lines."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    spans = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if target and labels.get(target[1], i) < i:
            spans.append((labels[target[1]], i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [lines[start : stop + 1] for start, stop in inner]


def _serialised(ptxas: str, loops: list[list[str]]) -> str:
    """ptxas' own words where it gave up on asynchronous wgmma, or what the loops show; empty where all is well."""
    if said := re.search(r"wgmma.mma_async instructions are serialized(.*?) in the function", ptxas):
        return f"wgmma serialised{said[1]}"
    for loop in loops:
        products = sum("HGMMA" in line for line in loop)
        waits = sum("WARPGROUP.DEPBAR" in line for line in loop)
        if products > 1 and waits >= products:
            return "a loop waits after each wgmma"
    return ""


def compile_launch(launch: Launch, arch: int, config: str = "", measured: bool = False) -> Report:
    """Compile one launch for sm_{arch} and read its machine code. Needs no GPU, but Triton without its interpreter."""
    start = time.perf_counter()
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(_source(launch), target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        # The wheel's plain ptxas rejects the newest PTX.
        suffix = "a" if arch >= 90 else ""
        said = _run(_tool("ptxas-blackwell"), "-v", f"--gpu-name=sm_{arch}{suffix}", str(ptx), "-o", f"{folder}/again.cubin")
        usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
    if "fatal" in said:
        raise RuntimeError(f"ptxas failed: {said}")
    counted = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert counted is not None, usage
    loops = [loop for loop in _loops(sass) if any(MMA.search(line) for line in loop)]
    arguments = launch.arguments
    blocks = "x".join(str(arguments[f"BLOCK_{d}"]) for d in "MNK" if f"BLOCK_{d}" in arguments)
    return Report(
        config=config,
        kernel=launch.kernel.__name__,
        tile=f"{blocks or arguments.get('BLOCK')} {launch.warps}w {launch.stages}s",
        arch=arch,
        registers=int(counted[1]),
        stack=int(counted[2]),
        shared=compiled.metadata.shared,
        mma=len(MMA.findall(sass)),
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
        seconds=seconds,
        spills_in_loops=sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for loop in loops for line in loop),
        serialised=_serialised(said, loops),
        uses_tensor_cores=arguments.get("PRECISION", "ieee") != "ieee",
        measured=measured,
    )


def _compile(config: Config, index: int) -> Report:
    plan = tiles.choose(config.call)
    return compile_launch(launches(config)[index], config.call.arch, str(config), plan.measured != tiles.NOT_MEASURED)


def _unique(configs: list[Config]) -> list[tuple[Config, int]]:
    """(configuration, number of the launch in it), each launch that differs from all before it."""
    seen, jobs = set(), []
    for config in configs:
        for i, launch in enumerate(launches(config)):
            source = _source(launch)
            key = (config.call.arch, launch.kernel.__name__, launch.warps, launch.stages, source.hash())
            if key not in seen:
                seen.add(key)
                jobs.append((config, i))
    return jobs


def main(arguments: list[str] | None = None) -> int:
    """Compile what the options select, print one row a kernel and the problems; 1 where there are any."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Compile the kernels of the tile table without a GPU.")
    parser.add_argument("--arch", type=int, choices=tiles.ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--precision", choices=("half", "tf32", "ieee"), help="default: all")
    parser.add_argument("--rank", type=int, choices=(16, 32, 64, 128), help="padded rank; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing; unset it")
    configs = [
        c for c in configurations(tuple(options.arch or tiles.ARCHITECTURES))
        if options.precision in (None, c.call.precision) and options.rank in (None, c.call.rank)
    ]  # fmt: skip
    jobs = _unique(configs)
    table = Table("kernel", "class", "tile", "registers", "stack", "shared", "MMA", "wgmma", "seconds", "problems")
    failed = 0
    with concurrent.futures.ProcessPoolExecutor(options.jobs) as pool:
        for report in pool.map(_compile, *zip(*jobs, strict=True)):
            problems = report.problems()
            failed += bool(problems)
            table.add_row(
                report.kernel, report.config, report.tile, str(report.registers), str(report.stack), str(report.shared),
                str(report.mma), str(report.wgmma), f"{report.seconds:.1f}", "; ".join(problems),
            )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print(f"{len(jobs)} kernels compiled, {failed} with problems")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
