"""One training step by fastlora, by textbook LoRA and by full fine-tuning: time and saved bytes, side by side."""

from __future__ import annotations

import collections
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoRAConfig
from ..patch import patch

__all__ = ["Cost", "compare"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one training step takes: median seconds, bytes saved for backward, trainable parameters."""

    name: str
    seconds: float
    saved_bytes: int
    trainable: int


class TextbookLoRA(nn.Module):
    """nn.MultiheadAttention with LoRA on q, k and v as it is usually written: three projections, a dropped copy of x for each.

    y = x Wᵀ + bias + scale · dropout(x) Aᵀ Bᵀ, for q, k and v apart.
    """

    def __init__(self, host: nn.MultiheadAttention, config: LoRAConfig) -> None:
        super().__init__()
        width = host.embed_dim
        self.heads, self.batch_first, self.scale = host.num_heads, host.batch_first, config.scale
        self.weight, self.bias, self.out_proj = host.in_proj_weight, host.in_proj_bias, host.out_proj
        self.dropout = nn.Dropout(config.dropout)
        self.active = [target in config.targets for target in ("q", "k", "v")]
        self.lora_A = nn.Parameter(
            torch.empty(3, config.rank, width, dtype=torch.float32).uniform_(-(width**-0.5), width**-0.5)
        )
        self.lora_B = nn.Parameter(torch.zeros(3, width, config.rank, dtype=torch.float32))

    def forward(self, x: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: object) -> tuple[Tensor, None]:
        x = x if self.batch_first else x.transpose(0, 1)
        parts = []
        for i, (weight, bias) in enumerate(zip(self.weight.chunk(3), self.bias.chunk(3), strict=True)):
            part = F.linear(x, weight, bias)
            if self.active[i]:
                part = part + self.scale * F.linear(F.linear(self.dropout(x), self.lora_A[i]), self.lora_B[i])
            parts.append(part.unflatten(-1, (self.heads, -1)).transpose(1, 2))
        q, k, v = parts
        out = F.scaled_dot_product_attention(q, k, v, attn_mask)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None


def textbook(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Give every attention of `model` a TextbookLoRA and freeze the rest."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.MultiheadAttention):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, TextbookLoRA(module, config))
    return model


Loss = Callable[[nn.Module], Tensor]


def compare(model: nn.Module, config: LoRAConfig, our_loss: Loss, host_loss: Loss, repeats: int = 5) -> list[Cost]:
    """Measure one step (forward, backward, AdamW) of each method on copies of the plain `model`, alternating.

    Args:
        model: an unpatched model whose attention is nn.MultiheadAttention in every block.
        config: rank, dropout and targets of both kinds of LoRA.
        our_loss, host_loss: the loss of one and the same batch under a model, by fastlora's encoders and by the host's.
        repeats: timed rounds, after one that is not timed.
    """
    ours = copy.deepcopy(model)
    patch(ours, config)
    naive = textbook(copy.deepcopy(model), config)
    full = copy.deepcopy(model).requires_grad_(True)
    steps = {
        "fastlora": _Step(ours, our_loss),
        "textbook LoRA": _Step(naive, host_loss),
        "full fine-tuning": _Step(full, host_loss),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():  # in turn, so that a busy machine slows all of them alike
            times[name].append(step())
    return [
        Cost(name, statistics.median(times[name][1:]), step.saved_bytes(), sum(p.numel() for p in step.trainable))
        for name, step in steps.items()
    ]


class _Step:
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model, self.loss = model.train(), loss
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=True)

    def __call__(self) -> float:
        """Seconds of one step."""
        _synchronise()
        begun = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(self.model).backward()
        self.optimizer.step()
        _synchronise()
        return time.perf_counter() - begun

    def saved_bytes(self) -> int:
        """Bytes that one forward pass keeps for backward, parameters and buffers left out."""
        known = [*self.model.parameters(), *self.model.buffers()]
        return sum(kept_for_backward(lambda: self.loss(self.model), known).values())


def kept_for_backward(forward: Callable[[], object], known: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of every storage that autograd keeps of one forward pass, but for those of `known` (parameters).

    What a custom function saves counts too, and so does an input: keeping it is the cost. A pass that differentiates parts of
    itself lets go of what these kept: what counts is the moment when most is kept.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    ledger = _Ledger()

    def pack(tensor: Tensor) -> _Kept | Tensor:
        return tensor if tensor.untyped_storage().data_ptr() in own else _Kept(tensor, ledger)

    def unpack(packed: _Kept | Tensor) -> Tensor:
        return packed.tensor if isinstance(packed, _Kept) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        result = forward()
    del result
    return ledger.most


class _Ledger:
    """The storages that are kept now, and those of the moment when they held most."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.most: dict[int, int] = {}
        self.holders: collections.Counter[int] = collections.Counter()

    def take(self, where: int, size: int) -> None:
        self.holders[where] += 1
        self.now[where] = size
        if sum(self.now.values()) > sum(self.most.values()):
            self.most = dict(self.now)

    def drop(self, where: int) -> None:
        self.holders[where] -= 1
        if not self.holders[where]:
            del self.now[where]


class _Kept:
    """One tensor that autograd keeps; autograd lets go of it by forgetting this object."""

    def __init__(self, tensor: Tensor, ledger: _Ledger) -> None:
        self.tensor, self._ledger, self._where = tensor, ledger, tensor.untyped_storage().data_ptr()
        ledger.take(self._where, tensor.untyped_storage().nbytes())

    def __del__(self) -> None:
        self._ledger.drop(self._where)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
