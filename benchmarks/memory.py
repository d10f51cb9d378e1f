"""Peak memory of a training step, in a process of its own: `measure(contestant, job)`.

On a CPU the peak resident size, and its growth over the state before the first step; on a GPU the allocator's peak, as bytes in
use. Saved bytes are what autograd keeps for backward, parameters left out; FLOPs are those of torch's counter over one step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines import TRAINEES, Job, Trainee, inputs, starting_adapters
from baselines.common import built
from fastlora.testing import count_flops
from measure import peak_memory, saved_bytes
from rows import ROOT


def ready(trainee: type[Trainee], job: Job) -> Trainee:
    """A contestant with the job's starting adapters."""
    return trainee(job, starting_adapters(job))


def counts(contestant: Trainee) -> dict[str, int]:
    """FLOPs of a step (products and attention, as torch counts them) and bytes its forward saves."""
    images, labels = inputs(contestant.job, 1)
    known = [*contestant.model.parameters(), *contestant.model.buffers()]
    saved: list[int] = []

    def step() -> None:
        losses: list[Tensor] = []
        saved.append(saved_bytes(lambda: losses.append(contestant.loss(images, labels)), known))
        losses.pop().backward()

    flops = count_flops(step)
    contestant.model.zero_grad(set_to_none=True)
    return {"flops": flops, "saved_bytes": saved[0]}


def page_faults() -> int | None:
    """How often this process touched a page that the system had to map first; None where it does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _here(name: str, job: Job) -> dict[str, int]:
    contestant = ready(TRAINEES[name], job)
    built.cache_clear()  # a user's process holds the model once
    images, labels = inputs(job, 1)
    device = torch.device(job.device)
    # moments of all weights exist from the first step on; those of adapters are too small to show
    steps = 2 if contestant.trains == "weights" else 1
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        with peak_memory(device) as peak:
            for _ in range(steps):
                contestant.step(images, labels)
        return {"peak_bytes": held + peak["peak_bytes"], "growth_bytes": peak["peak_bytes"]}
    # 5 resets the high-water mark, so that building the model does not count as the step's
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    for _ in range(steps):
        contestant.step(images, labels)
    peak_bytes = _resident("VmHWM")
    return {"peak_bytes": peak_bytes, "growth_bytes": peak_bytes - before}


def measure(name: str, job: Job) -> dict[str, int]:
    """peak_bytes and growth_bytes of a fresh process that takes a step or two; empty where the system does not tell."""
    if job.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return {}
    # an address space that glibc does not hand back would count pages of a freed tensor as held
    return fresh_process(Path(__file__), name, json.dumps(dataclasses.asdict(job)), MALLOC_TRIM_THRESHOLD_="0")


def fresh_process(script: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """The JSON object that a script prints last, in a process of its own with as many threads as this one.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    variables = os.environ | environment | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT.parent)
    if done.returncode:
        raise RuntimeError(f"{script.name} {arguments[0]}: the process that measures failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(_here(sys.argv[1], Job(**json.loads(sys.argv[2])))))
