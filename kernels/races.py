"""Shared memory that a product still reads when it is written again: a rule on Triton's own IR, for GPUs that are not here.

On Hopper a wgmma, on Blackwell a tcgen05 product reads its operands in shared memory while the program goes on. Triton's
pipeliner gives a load enough buffers that no copy lands in one that is still read. But where another operation reads the same
load too, Triton 3.6 to 3.9 takes one buffer too few (its issue 6691), and results are wrong now and then. On Ampere products
are synchronous, and nothing can race in this way.

`races` walks a kernel's TTGIR, turns of its loops included, and keeps the products in flight:

    ttng.warp_group_dot {isAsync}     in flight until a warp_group_dot_wait leaves fewer pending than were started after it
    ttng.tc_gen5_mma {is_async}       in flight until a wait_barrier on the barrier that it signals
    async copies, local stores        must not write a buffer that a product in flight reads

Buffers are told apart by the index into their allocation, which the IR computes from constants; what cannot be followed is
reported as well. Not seen: two allocations that Triton puts into the same bytes. Not modelled: phases of barriers; a wait is
taken for the last signal.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable
from typing import Any

__all__ = ["races"]

# Turns of an innermost loop, more than any pipeline is deep, and of a loop around others.
INNER, OUTER = 10, 2

_SSA = re.compile(r"%[\w.$-]+(?:#\d+)?")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": operator.add, "subi": operator.sub, "muli": operator.mul, "andi": operator.and_, "ori": operator.or_,
    "xori": operator.xor, "remsi": operator.mod, "remui": operator.mod,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sle": operator.le, "sgt": operator.gt, "sge": operator.ge,
    "ult": operator.lt, "ule": operator.le, "ugt": operator.gt, "uge": operator.ge,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Buffer:
    """One buffer of an allocation; index None where it could not be followed."""

    allocation: str
    index: int | None = 0


@dataclasses.dataclass(frozen=True)
class _Read:
    """A product in flight. barrier: what it signals, None for wgmma, which is waited for in order."""

    buffers: tuple[_Buffer, ...]
    barrier: _Buffer | None
    line: str


@dataclasses.dataclass
class _Node:
    """An operation and its regions: the body of a loop, the two branches of a condition."""

    text: str
    regions: list[list[_Node]] = dataclasses.field(default_factory=list)


def _parse(ttgir: str) -> list[_Node]:
    """The operations of the module, each with what it encloses."""
    root: list[_Node] = []
    stack = [root]
    for raw in ttgir.splitlines():
        text = re.sub(r"\s*loc\([^()]*(?:\([^()]*\)[^()]*)*\)$", "", raw.strip())
        if text.startswith("}"):
            stack.pop()
            if text.endswith("{"):  # } else {
                node = stack[-1][-1]
                node.regions.append([])
                stack.append(node.regions[-1])
            continue
        node = _Node(raw.strip())
        stack[-1].append(node)
        if text.endswith("{"):
            node.regions.append([])
            stack.append(node.regions[-1])
    return root


class _Walk:
    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.flying: list[_Read] = []
        self.found: dict[str, None] = {}

    def value(self, name: str) -> Any:
        return self.values.get(name)

    def run(self, nodes: list[_Node]) -> list[Any]:
        """Run a region; gives what it yields."""
        for node in nodes:
            results, _, text = node.text.partition(" = ") if node.text.startswith("%") else ("", "", node.text)
            name, _, rest = text.partition(" ")
            if name == "scf.yield":
                return [self.value(v) for v in _SSA.findall(rest.split(" : ")[0])]
            if node.regions:
                self.bind(results, self.region(name, rest, node))
            else:
                self.bind(results, [self.operation(name, rest, results, node.text)])
        return []

    def bind(self, results: str, values: list[Any]) -> None:
        """results: "%x" or "%x:3", whose parts are %x#0 to %x#2."""
        base, _, count = results.partition(":")
        for i in range(int(count or 1) if base else 0):
            self.values[f"{base}#{i}" if count else base] = values[i] if i < len(values) else None

    def region(self, name: str, header: str, node: _Node) -> list[Any]:
        if name == "scf.for":
            return self.loop(header, node.regions[0])
        if name == "scf.if":
            return self.branch(header, node.regions)
        for region in node.regions:  # the module and its functions; a reduction's body has no memory
            self.run(region)
        return []

    def loop(self, header: str, body: list[_Node]) -> list[Any]:
        pairs = re.search(r"iter_args\((.*?)\) ->", header)
        names, starts = zip(*re.findall(r"(%[\w.$-]+) = (%[\w.#$-]+)", pairs[1]), strict=True) if pairs else ((), ())
        carried = [self.value(start) for start in starts]
        for _ in range(OUTER if any(_has_loop(node) for node in body) else INNER):
            self.values.update(zip(names, carried, strict=True))
            yielded = self.run(body)
            carried = yielded if len(yielded) == len(names) else carried
        return carried

    def branch(self, header: str, regions: list[list[_Node]]) -> list[Any]:
        """Both branches, one beside the other, unless the condition is known; what either leaves in flight is in flight."""
        condition = self.value(_SSA.findall(header)[0])
        if condition is not None:
            chosen = regions[0] if condition else regions[1] if len(regions) > 1 else []
            return self.run(chosen)
        before, after, yielded = self.flying, [], []
        for region in regions:
            self.flying = list(before)
            yielded.append(self.run(region))
            after += [read for read in self.flying if read not in after]
        self.flying = after
        return [one if all(other == one for other in rest) else None for one, *rest in zip(*yielded, strict=False)]

    def operation(self, name: str, rest: str, result: str, text: str) -> Any:
        operands = _SSA.findall(rest.split(" : ")[0])
        values = [self.value(operand) for operand in operands]
        dialect, _, verb = name.partition(".")
        if dialect == "arith":
            return _arithmetic(verb, rest, values)
        if verb == "local_alloc":
            buffer = _Buffer(result)
            if operands:  # from registers, at once
                self.write([buffer], text)
            return buffer
        if verb == "memdesc_index":
            base, *index = values
            known = index[0] if len(index) == 1 else None
            return _Buffer(base.allocation, known) if isinstance(base, _Buffer) else None
        buffers = [value for value in values if isinstance(value, _Buffer)]
        if verb.startswith("memdesc_"):
            return buffers[0] if buffers else None
        if verb.startswith(("async_copy", "async_tma_copy_global", "async_tma_gather")) or verb == "local_store":
            self.write(buffers, text)
            if not buffers:
                self.found[f"where {_place(text)} writes cannot be followed"] = None
        elif verb in ("warp_group_dot", "tc_gen5_mma") and rest.count("#smem") > len(buffers):
            self.found[f"what {_place(text)} reads cannot be followed"] = None
        elif verb == "warp_group_dot" and "isAsync = true" in rest:
            self.flying.append(_Read(tuple(buffers), None, text))
        elif verb == "warp_group_dot_wait":
            pending = re.search(r"pendings = (\d+)", rest)
            assert pending is not None, text
            mine = [read for read in self.flying if read.barrier is None]
            done = mine[: max(0, len(mine) - int(pending[1]))]
            self.flying = [read for read in self.flying if read not in done]
        elif verb.startswith("tc_gen5_mma") and "is_async" in rest:
            signalled = re.findall(r"(%[\w.#$-]+)\[", rest.split(" : ")[0])
            barriers = [self.value(one) for one in signalled]
            reads = tuple(buffer for buffer in buffers if buffer not in barriers)
            self.flying.append(_Read(reads, barriers[0] if barriers else _Buffer("no barrier"), text))
        elif verb == "wait_barrier" and values:
            self.flying = [read for read in self.flying if read.barrier is None or read.barrier != values[0]]
        return None

    def write(self, buffers: list[_Buffer], text: str) -> None:
        for buffer in buffers:
            for read in self.flying:
                for other in read.buffers:
                    unsure = None in (other.index, buffer.index)
                    if other.allocation == buffer.allocation and (unsure or other == buffer):
                        written = "may be written" if unsure else "is written"
                        self.found[f"{buffer.allocation} {written} at {_place(text)} while {_place(read.line)} reads it"] = None


def _has_loop(node: _Node) -> bool:
    return "scf.for" in node.text or any(_has_loop(inner) for region in node.regions for inner in region)


def _arithmetic(verb: str, rest: str, values: list[Any]) -> int | None:
    """The value of a scalar operation on known integers, else None."""
    if verb == "constant":
        number = re.match(r"(-?\d+|true|false)\b(?! *:? *dense)", rest)
        return None if number is None else {"true": 1, "false": 0}.get(number[1]) if number[1][0] in "tf" else int(number[1])
    if verb == "select" and len(values) == 3 and values[0] is not None:
        return values[1] if values[0] else values[2]
    if len(values) == 2 and all(isinstance(value, int) for value in values):
        if verb == "cmpi":
            return int(_COMPARISONS[rest.split(",")[0]](*values))
        if verb in _ARITHMETIC:
            return _ARITHMETIC[verb](*values)
    return values[0] if verb in ("extsi", "extui", "trunci", "index_cast") and values else None


def _place(text: str) -> str:
    found = re.search(r"loc\(([^()]*)\)$", text)
    return found[1] if found else text.split(" ")[0]


def races(ttgir: str) -> list[str]:
    """What the module's rule finds in a kernel's TTGIR (Triton's `compiled.asm["ttgir"]`); empty where all is well."""
    lines = {m[1]: f"{m[2].rpartition('/')[2]}:{m[3]}" for m in re.finditer(r'^(#loc\d+) = loc\("([^"]+)":(\d+):', ttgir, re.M)}
    names = dict(re.findall(r'^(#loc\d+) = loc\((?:"[^"]*"\()?(?:callsite\()?(#loc\d+)', ttgir, re.M))
    walk = _Walk()
    walk.run(_parse(ttgir))

    def place(match: re.Match[str]) -> str:
        name = match[0]
        while name not in lines and name in names:
            name = names[name]
        return lines.get(name, name)

    return [re.sub(r"#loc\d+", place, one) for one in walk.found]
