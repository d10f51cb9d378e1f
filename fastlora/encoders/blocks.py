"""One residual attention block on packed rows (M, D), and the last one for the pooled rows alone.

The host's own modules do the work, in the host's order; only attention, the residual sums and what is kept for backward
differ: LayerNorm's output is computed again in backward instead of being kept beside its input.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import LoRALinear, LoRAMultiheadAttention
from ..products import frozen_linear
from .attention import attend, attend_pooled
from .mlp import QUICK, frozen_mlp, is_quick, serves
from .packing import Sequences

__all__ = ["Step", "run_block"]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one forward pass hands to every layer.

    Args:
        seed: keys the dropout masks of all layers; None where nothing drops out.
        rows: (M,) the identity of each row; None for 0 … M-1.
        checkpointed: whether blocks keep nothing but their input and run again in backward.
    """

    seed: Tensor | None
    rows: Tensor | None
    checkpointed: bool = False

    def at(self, index: Tensor) -> Step:
        """The same step for some of the rows."""
        return dataclasses.replace(self, rows=index if self.rows is None else self.rows[index])


def run_block(block: Any, x: Tensor, sequences: Sequences, step: Step, pooled: Tensor | None = None) -> Tensor:
    """open_clip's ResidualAttentionBlock on packed rows.

    Args:
        x: (M, D).
        pooled: (n,) the rows that are wanted, one for each sequence, which reads the whole of it: keys and values are those of
            all rows, queries, output projection and MLP are computed for these alone. None for all rows.

    Returns:
        (M, D), or (n, D) with `pooled`.
    """
    if step.checkpointed and torch.is_grad_enabled():
        # the seed is a constant of the step, so that the second run draws the same masks
        return checkpoint(_run, block, x, sequences, step, pooled, use_reentrant=False, preserve_rng_state=False)
    return _run(block, x, sequences, step, pooled)


def _run(block: Any, x: Tensor, sequences: Sequences, step: Step, pooled: Tensor | None) -> Tensor:
    heads = block.attn.num_heads
    if pooled is None:
        normed = block.ln_1(x)
        with _recomputed(normed, block.ln_1, x, step):
            qkv = _project(block.attn, normed, 0, 3, step)
        return _rest(block, x, attend(qkv, heads, sequences), step)

    read = sequences.prefix + sequences.body
    everyone, readable = step, x
    if sequences.readers:
        readable = x[:read]
        everyone = step if step.rows is None else dataclasses.replace(step, rows=step.rows[:read])
    normed = block.ln_1(readable)
    with _recomputed(normed, block.ln_1, readable, step):
        kv = _project(block.attn, normed, 1, 3, everyone)
    x, step = x.index_select(0, pooled), step.at(pooled)
    q = _project(block.attn, block.ln_1(x), 0, 1, step)
    return _rest(block, x, attend_pooled(q, kv, heads, sequences), step)


def _rest(block: Any, x: Tensor, attended: Tensor, step: Step) -> Tensor:
    """What follows attention: the output projection and the MLP, each added to x."""
    x = _add(x, block.ls_1, block.attn.out_proj, attended, step)
    normed = block.ln_2(x)
    plain = _plain(block.mlp.c_fc, normed) and _plain(block.mlp.c_proj, normed) and isinstance(block.ls_2, nn.Identity)
    if plain and x.dtype == normed.dtype and serves(block.mlp, x):
        return frozen_mlp(block.mlp, x, normed)
    # QuickGELU(u) = silu(1.702 u) / 1.702: silu is one kernel that keeps its input alone, the factors go into the products
    quick = is_quick(block.mlp)
    with _recomputed(normed, block.ln_2, x, step):
        hidden = _linear(block.mlp.c_fc, normed, step, QUICK if quick else 1.0)
    hidden = F.silu(hidden) if quick else block.mlp.gelu(hidden)
    return _add(x, block.ls_2, block.mlp.c_proj, hidden, step, 1 / QUICK if quick else 1.0)


def _project(attention: Any, x: Tensor, first: int, last: int, step: Step) -> Tensor:
    """The projections first … last-1 of (q, k, v): x (M, D) -> (M, (last-first) · D)."""
    if isinstance(attention, LoRAMultiheadAttention):
        if (first, last) == (0, 3):
            return attention.project_qkv(x, seed=step.seed, rows=step.rows)
        return attention.project_group(x, first, last, seed=step.seed, rows=step.rows)
    rows = slice(first * attention.embed_dim, last * attention.embed_dim)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
    return frozen_linear(x, attention.in_proj_weight[rows], bias)


def _linear(layer: Any, x: Tensor, step: Step, factor: float = 1.0) -> Tensor:
    """factor · layer(x)."""
    if _plain(layer, x):
        if factor == 1.0:
            return frozen_linear(x, layer.weight, layer.bias)
        return torch.addmm(layer.bias, x, layer.weight.T, beta=factor, alpha=factor)
    y = layer(x, seed=step.seed, rows=step.rows) if isinstance(layer, LoRALinear) else layer(x)
    return y if factor == 1.0 else y * factor


def _plain(layer: Any, x: Tensor) -> bool:
    """Whether `layer(x)` is x Wᵀ + bias and nothing else: no adapter, no subclass, no cast."""
    return (
        isinstance(layer, nn.Linear)
        and not isinstance(layer, LoRALinear)
        and type(layer).forward is nn.Linear.forward
        and layer.bias is not None
        and layer.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def _add(x: Tensor, scale: Any, layer: Any, h: Tensor, step: Step, factor: float = 1.0) -> Tensor:
    """x + scale(layer(factor · h)): one product that adds to x where the layer is plain."""
    if isinstance(scale, nn.Identity) and _plain(layer, h) and x.dtype == h.dtype:
        if factor == 1.0:
            return frozen_linear(h, layer.weight, layer.bias, x)
        return (x + layer.bias).addmm_(h, layer.weight.T, alpha=factor)
    return x + scale(_linear(layer, h if factor == 1.0 else h * factor, step))


@contextlib.contextmanager
def _recomputed(normed: Tensor, norm: Any, x: Tensor, step: Step) -> Iterator[None]:
    """Within: whoever saves `normed` for backward saves nothing; it is norm(x) again then. x is kept by norm anyway."""
    if not x.requires_grad or normed is x or step.checkpointed or torch.compiler.is_compiling():
        yield
        return
    where, shape, source = normed.data_ptr(), normed.shape, x.detach()

    def pack(tensor: Tensor) -> Any:
        same = tensor.data_ptr() == where and tensor.shape == shape and tensor.is_contiguous()
        return None if same else tensor

    def unpack(kept: Any) -> Tensor:
        if kept is not None:
            return kept
        with torch.no_grad():
            return norm(source)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
