"""What a compiled kernel is worth, read from its machine code: registers, stack, shared memory, its products' loops."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

from .races import races

__all__ = ["Report", "read"]

# Shared memory one program may have, in bytes: CUDA C++ Programming Guide, technical specifications per compute capability. The
# rows of sm_80 serve sm_86 and sm_89 too, RTX cards and the L4, which have less than the A100's 163 KiB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# More than this without a measured time is refused: a few spilled addresses outside of the loops cost nothing, tiles do.
STACK_LIMIT = 64
# A compiled loop: from a label to a branch back to it. MMA: mma.sync, wgmma, tcgen05.
MMA = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s")
# From global memory to registers or, asynchronously, to shared memory; the width in bits where it is not 32.
GLOBAL_LOAD = re.compile(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one launch.

    Args:
        registers: of one thread.
        stack, shared: bytes of one thread, of one program.
        mma, wgmma: products of the tensor cores, and those of them that are Hopper's asynchronous ones, in the whole kernel.
        cpu_seconds: of compiling, Triton's and ptxas's: how busy the machine was does not show.
        spills_in_loops: loads and stores of local memory inside loops with products.
        serialised: why wgmma is not asynchronous; empty where it is.
        loop: instructions of the loop with most products, per product of a warp in it; 0 where there is none.
        load: bytes that a thread's narrowest load from global memory moves in the loops with products; 0 where there is none.
        races: shared memory that is written while an asynchronous product reads it (races.py).
    """

    registers: int
    stack: int
    shared: int
    mma: int
    wgmma: int
    cpu_seconds: float
    spills_in_loops: int
    serialised: str
    loop: float
    load: int
    races: list[str]

    def problems(self, arch: int, uses_tensor_cores: bool, measured: bool) -> list[str]:
        """Why sm_{arch} must not use this; empty where it may. measured: the plan it belongs to has a measured time."""
        found = []
        found += [f"race: {race}" for race in self.races]
        if self.spills_in_loops:
            found.append(f"{self.spills_in_loops} local loads or stores inside an MMA loop")
        if self.serialised:
            found.append(self.serialised)
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"{self.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
        if uses_tensor_cores and not self.mma:
            found.append("tensor cores lost")
        if self.stack > STACK_LIMIT and not measured:
            found.append(f"{self.stack} bytes of stack and no measured time")
        return found


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


def _per_product(loops: list[list[str]]) -> float:
    counts = [[sum(bool(what.search(line)) for line in loop) for what in (MMA, INSTRUCTION)] for loop in loops]
    products, instructions = max(counts, default=(0, 0))
    return instructions / products if products else 0.0


def _narrowest_load(loops: list[list[str]]) -> int:
    loads = [m[0].split(".") for loop in loops for line in loop if (m := GLOBAL_LOAD.search(line))]
    bits = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return min((next((bits[part] for part in load if part in bits), 32) // 8 for load in loads), default=0)


def read(compiled: Any, arch: int, cpu_seconds: float) -> Report:
    """The report of a kernel that Triton compiled for sm_{arch} in so many CPU seconds. Needs no GPU."""
    said = ""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(_tool("cuobjdump"), "-res-usage", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))
        if "wgmma" in compiled.asm["ptx"]:
            # only ptxas tells that it serialised them; the wheel's plain ptxas rejects the newest PTX
            ptx = Path(folder, "kernel.ptx")
            ptx.write_text(compiled.asm["ptx"])
            said = _run(_tool("ptxas-blackwell"), "-v", f"--gpu-name=sm_{arch}a", str(ptx), "-o", f"{folder}/again.cubin")
            if "fatal" in said:
                raise RuntimeError(f"ptxas failed: {said}")
    counted = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert counted is not None, usage
    loops = [loop for loop in _loops(sass) if any(MMA.search(line) for line in loop)]
    return Report(
        registers=int(counted[1]),
        stack=int(counted[2]),
        shared=compiled.metadata.shared,
        mma=len(MMA.findall(sass)),
        wgmma=len(re.findall(r"\bHGMMA\b", sass)),
        cpu_seconds=round(cpu_seconds, 2),
        spills_in_loops=sum(bool(re.search(r"\b(?:LDL|STL)\b", line)) for loop in loops for line in loop),
        serialised=_serialised(said, loops),
        loop=round(_per_product(loops), 1),
        load=_narrowest_load(loops),
        races=races(compiled.asm["ttgir"]),
    )
