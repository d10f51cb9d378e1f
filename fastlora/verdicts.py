"""What is known of the kernels on one GPU, kept in the user's cache folder: `Verdict`s and what `measure` found fastest.

One file for each key (GPU, driver, torch, Triton, source of the kernels): nothing outlives what it was found with. Lines of
JSON, each appended in one write, since several processes write at once; a torn line, or one of another key, is passed over.
The folder is $XDG_CACHE_HOME/fastlora, else ~/.cache/fastlora.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .kernels import candidates, tiles

__all__ = ["Book", "Choice", "Key", "Kind", "Served", "Verdict", "book"]

log = logging.getLogger("fastlora")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A class of calls: what one verdict holds for.

    Args:
        call: architecture, precision, padded rank, dropout or not.
        dtype: of x.
        adapters: dtypes of A and B.
        active: for each group whether it has an adapter.
        n, k: of the weight (N, K).
        planes: of the dropout's bits (rng.bit_planes), (0, 0) for none.
        bias: whether there is one; always False for a backward, which does not see it.
        needs: dx, dA, dB of a backward; all False for a forward.
    """

    direction: candidates.Direction
    call: tiles.Call
    dtype: torch.dtype
    adapters: tuple[torch.dtype, torch.dtype]
    active: tuple[bool, ...]
    n: int
    k: int
    planes: tuple[int, int] = (0, 0)
    bias: bool = False
    needs: tuple[bool, bool, bool] = (False, False, False)

    def __str__(self) -> str:
        on = [str(i) for i, active in enumerate(self.active) if active]
        groups = "" if len(on) == len(self.active) == 1 else f", groups {' '.join(on)} of {len(self.active)}"
        wanted = [name for name, need in zip(("dx", "dA", "dB"), self.needs, strict=True) if need]
        adapters = "/".join(dict.fromkeys(map(_name, self.adapters)))
        return (
            f"{' '.join([self.direction, *wanted])}, {self.k}→{self.n}{groups}, {_name(self.dtype)} ({self.call.precision}),"
            f" adapters {adapters}, rank {self.call.rank // 2 + 1 if self.call.rank > 16 else 1} to {self.call.rank},"
            f" {f'dropout {self.planes[0] / 2 ** self.planes[1]:g}' if self.call.dropout else 'no dropout'}"
            f"{', bias' if self.bias else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"dtype": _name(self.dtype), "adapters": [*map(_name, self.adapters)]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Kind:
        """The kind that `to_json` wrote."""
        dtypes = {"dtype": _dtype(values["dtype"]), "adapters": tuple(map(_dtype, values["adapters"]))}
        tuples = {name: tuple(values[name]) for name in ("active", "needs", "planes")}
        return cls(**values | dtypes | tuples | {"call": tiles.Call(**values["call"])})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    return {_name(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}[name]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether the kernels are right for a kind of calls.

    Args:
        worst: the largest error as a share of what the rule allows; None where there was nothing to compare.
        what: what is wrong, in words.
        lasting: whether it holds for later processes too.
        stopped: the kernels left the GPU unusable for the process.
    """

    right: bool
    worst: float | None = None
    what: str = ""
    lasting: bool = True
    stopped: bool = False

    def __str__(self) -> str:
        if not self.right:
            return f"wrong, eager serves: {self.what}"
        return "right" if self.worst is None else f"right: at most {self.worst:.2f} of the error that is allowed"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The fastest form for a kind of calls, as `fastlora.backend.measure` found it.

    Args:
        plan: None for eager.
        rows: of x at which the forms were timed.
        time, eager, table: microseconds of the chosen form, eager, and the plan of the table's row; None where that one failed.
        form: the chosen one in words.
    """

    plan: tiles.Plan | None
    rows: int
    time: float
    eager: float
    table: float | None
    form: str

    def __str__(self) -> str:
        table = "failed" if self.table is None else f"{self.table:.1f} µs"
        return f"{self.form} {self.time:.1f} µs at {self.rows} rows (eager {self.eager:.1f} µs, the table's row {table})"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Choice:
        """The choice that `dataclasses.asdict` gave."""
        plan = values["plan"]
        if plan is not None:
            plan = tiles.Plan(**{name: tiles.Tile(**v) if isinstance(v, dict) else v for name, v in plan.items()})
        return cls(**values | {"plan": plan})


class Served(NamedTuple):
    """What answers a kind of calls in this process: a module with `forward` and `backward`, and their options."""

    module: ModuleType
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Key:
    """What a verdict was found with. kernels: a hash of their source."""

    gpu: str
    driver: str
    torch_version: str
    triton_version: str
    kernels: str

    @classmethod
    def of(cls, device: torch.device) -> Key:
        """The key of a GPU in this process."""
        import triton

        return cls(torch.cuda.get_device_name(device), driver(), torch.__version__, triton.__version__, source())

    def file(self) -> Path:
        """Where its verdicts are.

        Raises:
            RuntimeError: there is no home directory.
        """
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastlora"
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()
        return folder / f"{re.sub('[^a-z0-9]+', '-', self.gpu.lower()).strip('-')}-{digest[:12]}.jsonl"


def driver() -> str:
    """The version of the GPU's driver, as far as it can be read; else the newest CUDA that it serves."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    if found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text):
        return found[1]
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if version is None else f"CUDA {version()}"


@functools.cache
def source() -> str:
    """A hash of the kernels' source."""
    digest = hashlib.sha256()
    for path in sorted(Path(tiles.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Book:
    """What is known of one GPU: read once, added to by `note`. served: what answers in this process, once it has answered."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.path: Path | None = None
        self.verdicts: dict[Kind, Verdict] = {}
        self.choices: dict[Kind, Choice] = {}
        self.served: dict[Kind, Served] = {}
        self._torn = self._told = False
        self.read()

    def read(self) -> None:
        """Take in what the file holds."""
        try:
            self.path = self.key.file()
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except (OSError, RuntimeError) as error:
            self._tell(error)
            return
        self._torn = bool(text) and not text.endswith("\n")
        key = dataclasses.asdict(self.key)
        for line in text.splitlines():
            try:
                values = json.loads(line)
                if values["key"] != key:
                    continue
                kind = Kind.from_json(values["kind"])
                if "choice" in values:
                    self.choices[kind] = Choice.from_json(values["choice"])
                else:
                    self._enter(kind, Verdict(**values["verdict"]))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # torn, or not ours
                continue

    def note(self, kind: Kind, finding: Verdict | Choice) -> None:
        """Keep a finding, here and in the file; one that is not lasting here only."""
        self.served.pop(kind, None)
        if isinstance(finding, Choice):
            self.choices[kind], name = finding, "choice"
        else:
            self._enter(kind, finding)
            name = "verdict"
            if not finding.lasting:
                return
        line = {"key": dataclasses.asdict(self.key), "kind": kind.to_json(), name: dataclasses.asdict(finding)}
        try:
            self._append(json.dumps(line, ensure_ascii=False) + "\n")
        except (OSError, RuntimeError) as error:
            self._tell(error)

    def measured(self, kind: Kind) -> bool:
        """Whether the table's row was measured on this GPU, which nobody is before being right."""
        return any(point.gpu == self.key.gpu for point in tiles.row_of(kind.call).measured)

    def rows(self) -> list[tuple[str, str]]:
        """What is known, as `fastlora info` prints it: (class, verdict or choice) each, and the file."""
        known: dict[Kind, Verdict | Choice] = {**self.verdicts, **self.choices}
        rows = [(str(kind), str(finding)) for kind, finding in known.items()]
        return [*rows, ("verdicts", f"{len(rows) or 'none yet'}, in {self.path}")]

    def _enter(self, kind: Kind, verdict: Verdict) -> None:
        known = self.verdicts.get(kind)
        if known is None or known.right or not known.lasting:  # of two processes that disagree, the one that says wrong
            self.verdicts[kind] = verdict

    def _append(self, line: str) -> None:
        self.path = self.path or self.key.file()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        opened = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(opened, ("\n" * self._torn + line).encode())
        finally:
            os.close(opened)
        self._torn = False

    def _tell(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            log.info("what is found out about the kernels on %s is kept for this process only: %s", self.key.gpu, error)


@functools.cache
def book(device: torch.device) -> Book:
    """The book of a GPU, opened once a process."""
    return Book(Key.of(device))
