"""Several processes, one run: images and class prompts are sharded, everything else is the same on every rank.

Under torchrun each rank takes its part of every batch and of the class prompts. All ranks draw the same dropout seeds, and
each row keeps the identity it has in the whole batch, so 2 ranks x 16 images take the steps of 1 rank x 32, with dropout on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["ALONE", "Ranks"]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many.

    Args:
        rank: 0 … world - 1; rank 0 prints and writes.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    @contextlib.contextmanager
    def join(cls, device: torch.device) -> Iterator[Ranks]:
        """Within: the group that torchrun announced in the environment, by NCCL for a GPU and gloo else; alone without one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield ALONE
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    def device(self, device: torch.device) -> torch.device:
        """This rank's own GPU of its machine where the ranks run on GPUs, else `device`."""
        return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device

    @property
    def first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def shard(self, n: int) -> slice:
        """This rank's part of n things: parts differ by one at most and lie in the order of the ranks."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def shards(self, n: int) -> list[slice]:
        """The parts of all ranks."""
        return [Ranks(rank, self.world).shard(n) for rank in range(self.world)]

    def gather(self, local: Tensor, n: int) -> Tensor:
        """The rows (n, d) of all ranks from each one's `shard(n)`; backward gives each rank its rows' gradients, summed."""
        return local if self.world == 1 else _Gather.apply(local, n, self)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum .grad over ranks, in one message; a rank without a gradient takes part with zeros."""
        if self.world == 1:
            return
        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over ranks."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether `flag` is set on any rank, so that all of them stop at the same step."""
        return bool(self.sum(torch.tensor(float(flag), dtype=torch.float32, device=device)) > 0) if self.world > 1 else flag

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, n: int, ranks: Ranks) -> Tensor:
        # shards differ by a row: each is sent at the size of the largest
        largest = -(-n // ranks.world)
        padded = local.new_zeros(largest, *local.shape[1:])
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in range(ranks.world)]
        dist.all_gather(parts, padded)
        ctx.ranks, ctx.n = ranks, n
        return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, ranks.shards(n), strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ranks, n = ctx.ranks, ctx.n
        largest, shards = -(-n // ranks.world), ranks.shards(n)
        padded = gradient.new_zeros(ranks.world, largest, *gradient.shape[1:])
        for part, shard in zip(padded, shards, strict=True):
            part[: shard.stop - shard.start] = gradient[shard]
        mine = torch.empty_like(padded[0])
        # torch 2.14 renamed it, and warns of the name that 2.11 has
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(mine, padded.flatten(0, 1))
        own = shards[ranks.rank]
        return mine[: own.stop - own.start], None, None
