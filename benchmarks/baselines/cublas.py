"""LoRA on the host's packed q, k, v with cuBLAS' beta = 1 and torch's own dropout: the strongest form without a kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cublas

from .common import Adapters, Trainee, blocks, cut, gather


class PackedAttention(nn.Module):
    """nn.MultiheadAttention with LoRA on its packed q, k, v product: lora_A (3, R, D) and lora_B (3D, R), fp32."""

    def __init__(self, attention: Any, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.embed_dim = attention.num_heads, attention.embed_dim
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj, self.scale, self.dropout = attention.out_proj, scale, dropout
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Self-attention of query (batch, tokens, D), causal where the host has a mask; no weights are returned."""
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        rows = query.flatten(0, 1).to(dtype)
        weight, bias = (t.to(dtype) for t in (self.in_proj_weight, self.in_proj_bias))
        p = self.dropout if self.training else 0.0
        packed = cublas.beta_one(rows, weight, bias, self.lora_A, self.lora_B, self.scale, p, cublas.torchs_dropout(p))
        q, k, v = packed.view(*query.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        out = F.scaled_dot_product_attention(q, k, v, is_causal=attn_mask is not None)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class CublasBeta(Trainee):
    """Tokens are made once; prompts are encoded by the host, at its full context length."""

    name = "cuBLAS beta=1"

    def install(self, adapters: Adapters) -> None:
        for tower, rows in blocks(self.model).items():
            for block, row in enumerate(rows):
                a, b = zip(*(adapters[tower, block, i] for i in range(3)), strict=True)
                row.attn = PackedAttention(row.attn, torch.stack(a), torch.cat(b), self.job.scale, self.job.dropout)
        self.model.train()

    def gradients(self) -> dict[str, Tensor]:
        return gather(cut(self.model, lambda p: p.grad))
