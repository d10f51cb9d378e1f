"""One of several processes that train a patched model together, by DDP and then by FSDP2: python sharded.py RANK WORLD FOLDER.

Each takes its share of the batch, and writes its losses and the adapter it sees to FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastlora
from models import inputs, tiny

STEPS, BATCH = 3, 4


class Step(nn.Module):
    """A CLIP and a loss that is a mean over its batch, so that processes' gradients average to the whole's."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = tiny()
        torch.manual_seed(5)
        fastlora.patch(self.clip, rank=4, targets=("q", "v", "o", "fc1"), dropout=0.0)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        image, text = self.clip(images, tokens)[:2]
        return (image - text.roll(1, 1)).square().sum(1).mean()


def train(model: nn.Module, rank: int = 0, world: int = 1) -> list[float]:
    """Losses of a few steps on this process's share of the batch."""
    images, tokens = inputs(tiny(), BATCH)
    share = slice(rank, None, world)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(images[share], tokens[share])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parallel(kind: str, step: Step, world: int) -> Any:
    """The model for DDP, or sharded block by block (FSDP2)."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(step)
    mesh = init_device_mesh("cpu", (world,))
    for block in (*step.clip.transformer.resblocks, *step.clip.visual.transformer.resblocks):
        fully_shard(block, mesh=mesh)
    # it takes no parameter without dimensions: logit_scale
    return fully_shard(step, mesh=mesh, ignored_params={p for p in step.parameters() if p.ndim == 0})


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    for kind in ("ddp", "fsdp"):
        step = Step().train()
        losses = train(parallel(kind, step, world), rank, world)
        fastlora.save(step.clip, folder / f"{kind}-{rank}.safetensors")
        (folder / f"{kind}-{rank}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
