"""The few-shot job under torchrun: two processes take the steps of one, dropout on."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.multiprocessing import start_processes

from fastlora.fewshot.distributed import ALONE, Ranks
from pictures import command, make_folder, tiny_clip, train_arguments
from waiting import HANG


def torchrun(processes: int, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "fastlora",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG)


def history(run: Path) -> list[list[float]]:
    with open(run / "history.csv") as file:
        return [[float(value) for value in row] for row in list(csv.reader(file))[1:]]


@pytest.mark.parametrize("n", [0, 1, 5, 32, 1001])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_are_a_partition_in_order(n: int, world: int) -> None:
    parts = [list(range(n))[Ranks(rank, world).shard(n)] for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_alone_nothing_is_sent() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    assert ALONE.gather(x, 3) is x
    assert ALONE.any(True, torch.device("cpu")) and not ALONE.any(False, torch.device("cpu"))


def gather_and_differentiate(rank: int, folder: Path) -> None:
    """One of two processes: rows of its shard of five, gathered; a loss of its own; the gradients of its rows."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    ranks = Ranks(rank, 2)
    local = torch.arange(10.0).view(5, 2)[ranks.shard(5)].requires_grad_()
    everything = ranks.gather(local, 5)
    (everything * torch.arange(10.0).view(5, 2) * (rank + 1)).sum().backward()
    torch.save((everything.detach(), local.grad), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gathered_rows_get_the_gradients_of_all_ranks(tmp_path: Path) -> None:
    """Shards of two and three rows: each rank's own rows get what both ranks' losses say of them, and nothing twice."""
    start_processes(gather_and_differentiate, (tmp_path,), nprocs=2, start_method="fork")
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for everything, _ in results:
        assert torch.equal(everything, torch.arange(10.0).view(5, 2))
    gradients = torch.cat([gradient for _, gradient in results])
    assert torch.equal(gradients, 3 * torch.arange(10.0).view(5, 2))
    assert [len(gradient) for _, gradient in results] == [2, 3]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    """3 classes x 2 shots in batches of 4: uneven shards of prompts and images, short last batches, dropout at 0.25."""
    model, data = tiny_clip(tmp_path / "model"), make_folder(tmp_path / "data", ["red", "green", "blue"])
    one, two = tmp_path / "one", tmp_path / "two"
    more = ("--batch-size", "4", "--rank", "4")
    subprocess.run(
        command(*train_arguments(data, one, model, *more)), cwd=tmp_path, check=True, capture_output=True, timeout=HANG
    )
    done = torchrun(2, *train_arguments(data, two, model, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("report:") == 1  # one process speaks
    for left, right in zip(history(one), history(two), strict=True):
        assert right == pytest.approx(left, rel=1e-4)
    ours, theirs = (load_file(run / "adapter.safetensors") for run in (two, one))
    for name, tensor in theirs.items():
        # AdamW divides by the gradient's size: sums in another order show where gradients are near zero
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_more_processes_than_classes_is_told(tmp_path: Path) -> None:
    model, data = tiny_clip(tmp_path / "model"), make_folder(tmp_path / "data", ["red", "green"])
    done = torchrun(3, *train_arguments(data, tmp_path / "run", model), cwd=tmp_path)
    assert done.returncode != 0
    assert "3 processes share 2 class prompts" in done.stderr
