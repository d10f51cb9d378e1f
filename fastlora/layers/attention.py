"""LoRAMultiheadAttention: nn.MultiheadAttention with adapters."""

from __future__ import annotations

import dataclasses
import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import LoRALayer

__all__ = ["LoRAMultiheadAttention"]


@dataclasses.dataclass(frozen=True)
class _Options:
    """How one call attends and what it gives; `dropout` is 0 where nothing is trained."""

    batch_first: bool
    dropout: float
    need_weights: bool
    average: bool


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with adapters on its packed q, k, v; the options of the host behave as its own."""

    def base_weights(self) -> tuple[Tensor, ...]:
        return (self.in_proj_weight,)

    def project_qkv(self, x: Tensor, *, seed: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (..., D) -> q, k, v side by side (..., 3D)."""
        return self._project(x, self.in_proj_bias, seed, rows)

    def project_group(
        self, x: Tensor, first: int, last: int, *, seed: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Only the projections first … last-1 of (q, k, v): x (..., D) -> (..., (last-first)·D)."""
        rows_of_bias = slice(first * self.embed_dim, last * self.embed_dim)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[rows_of_bias]
        return self._project(x, bias, seed, rows, slice(first, last))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: the same arguments, shapes and results."""
        if is_causal and attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        dropout = self.dropout if self.training else 0.0
        options = _Options(self.batch_first, dropout, need_weights, average_attn_weights)
        return self._attend(query, key, value, key_padding_mask, attn_mask, options)

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is not F.multi_head_attention_forward:
            return super().answer(func, args, kwargs)
        # nn.MultiheadAttention's own forward comes here: called by a subclass, a wrapper or a function in its place
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        own = (self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
        given = (call.in_proj_weight, call.in_proj_bias, call.out_proj_weight, call.out_proj_bias)
        more = (call.bias_k, call.bias_v, call.static_k, call.static_v)
        known = all(a is b for a, b in zip(own, given, strict=True)) and all(part is None for part in more)
        if not known or call.num_heads != self.num_heads or call.add_zero_attn or call.use_separate_proj_weight:
            return None
        if call.is_causal and call.attn_mask is None:
            raise RuntimeError("need attn_mask if specifying the is_causal hint")
        dropout = call.dropout_p if call.training else 0.0
        options = _Options(False, dropout, call.need_weights, call.average_attn_weights)
        return self._attend(call.query, call.key, call.value, call.key_padding_mask, call.attn_mask, options)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        same = query is key and key is value
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not options.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if not same:  # self-attention on copies stays one packed product only where the tensors are the same object
            seed = self._shared_seed(query)
            parts = [self.project_group(t, i, i + 1, seed=seed) for i, t in enumerate((query, key, value))]
        else:
            parts = list(self.project_qkv(query).chunk(3, -1))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in parts)

        mask = self._attention_mask(attn_mask, key_padding_mask, q, k)
        dropout = options.dropout
        if options.need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            weights = None
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))

        if weights is not None:
            weights = weights.mean(1) if options.average else weights
            weights = weights if batched else weights[0]
        if not batched:
            return out[0], weights
        return (out if options.batch_first else out.transpose(0, 1)), weights

    def _shared_seed(self, x: Tensor) -> Tensor | None:
        """One seed for three separate calls: a draw each would be as right, but packed and separate then differ."""
        if not self.training or self.spec.dropout == 0.0 or self.merged or not self.adapted:
            return None
        return torch.randint(2**63 - 1, (), device=x.device)

    def _attention_mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """Both masks (bool: True is masked; float: added) as one additive mask that broadcasts to (B, H, L, S)."""

        def additive(mask: Tensor) -> Tensor:
            return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask

        mask = None
        if attn_mask is not None:
            mask = additive(attn_mask).to(q.dtype)
            if mask.ndim == 3:  # (B·H, L, S)
                mask = mask.view(len(q), self.num_heads, q.shape[2], k.shape[2])
        if key_padding_mask is not None:
            padding = additive(key_padding_mask).to(q.dtype).view(-1, 1, 1, k.shape[2])
            mask = padding if mask is None else mask + padding
        return mask
