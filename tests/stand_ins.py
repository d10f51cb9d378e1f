"""Models with the attributes of hosts that cannot be installed beside the others: OpenAI's clip, open_clip 4's attention."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn


class PackedAttention(nn.Module):
    """open_clip 4's form: nn.MultiheadAttention's in_proj_weight, in_proj_bias and out_proj, a forward of its own.

    Keys and values may come from elsewhere: then the weight is cut in three, and each part projects what is its own. `scaled`:
    queries and keys are normalised, heads and the result are scaled, as its custom blocks can have it.
    """

    def __init__(self, width: int, heads: int, scaled: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width) * 0.1)
        self.out_proj = nn.Linear(width, width)
        self.ln_q = nn.LayerNorm(width // heads) if scaled else nn.Identity()
        self.ln_k = nn.LayerNorm(width // heads) if scaled else nn.Identity()
        self.ln_inner = nn.LayerNorm(width) if scaled else nn.Identity()
        self.head_scale = nn.Parameter(torch.rand(heads, 1, 1) + 0.5) if scaled else None

    def forward(
        self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        if k_x is None and v_x is None:
            parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
            weights, biases = self.in_proj_weight.chunk(3, dim=0), self.in_proj_bias.chunk(3)
            parts = tuple(F.linear(*part) for part in zip(inputs, weights, biases, strict=True))
        head = x.shape[-1] // self.heads
        q, k, v = (part.reshape(len(x), -1, self.heads, head).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(self.ln_q(q), self.ln_k(k), v, attn_mask)
        y = y if self.head_scale is None else y * self.head_scale
        return self.out_proj(self.ln_inner(y.transpose(1, 2).flatten(2)))


class ScaledAttention(PackedAttention):
    """The same with its norms and scales."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, scaled=True)


class Block(nn.Module):
    """A residual attention block around either attention; `batch_first` False is OpenAI's order."""

    def __init__(self, width: int, heads: int, attention: type[nn.Module], mask: Tensor | None) -> None:
        super().__init__()
        self.attn = attention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.attn_mask is None else self.attn_mask.to(x.dtype)
        normed = self.ln_1(x)
        if isinstance(self.attn, nn.MultiheadAttention):
            attended = self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        else:
            attended = self.attn(normed, k_x=normed, v_x=normed, attn_mask=mask)
        x = x + attended
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks under .resblocks."""

    def __init__(self, width: int, heads: int, layers: int, attention: type[nn.Module], mask: Tensor | None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, heads, attention, mask) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        # nn.MultiheadAttention as OpenAI uses it wants the sequence first
        first = isinstance(self.resblocks[0].attn, nn.MultiheadAttention)
        return self.resblocks(x.transpose(0, 1)).transpose(0, 1) if first else self.resblocks(x)


class Vision(nn.Module):
    """A ViT with a class token: .conv1, .class_embedding, .positional_embedding, .ln_pre, .transformer, .ln_post, .proj."""

    def __init__(
        self, size: int, patch: int, width: int, heads: int, layers: int, out: int, attention: type[nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.1)
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * 0.1)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, heads, layers, attention, None)
        self.proj = nn.Parameter(torch.randn(width, out) * width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class CLIP(nn.Module):
    """OpenAI's CLIP: .visual, .transformer, .token_embedding, .positional_embedding, .ln_final, .text_projection."""

    def __init__(self, attention: type[nn.Module] = nn.MultiheadAttention, *, width: int = 64, layers: int = 2, **sizes: Any):
        super().__init__()
        context, words = sizes.get("context", 16), sizes.get("words", 100)
        heads, out = width // sizes.get("head", 32), sizes.get("out", 32)
        self.context_length, self.vocab_size = context, words
        self.visual = Vision(sizes.get("size", 32), sizes.get("patch", 8), width, heads, layers, out, attention)
        mask = torch.full((context, context), float("-inf")).triu_(1)
        self.transformer = Transformer(width, heads, layers, attention, mask)
        self.token_embedding = nn.Embedding(words, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width) * 0.1)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out) * width**-0.5)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.to(self.dtype))

    def encode_text(self, text: Tensor) -> Tensor:
        x = (self.token_embedding(text) + self.positional_embedding).to(self.dtype)
        x = self.ln_final(self.transformer(x))
        return x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(self.encode_image(image), dim=-1), F.normalize(self.encode_text(text), dim=-1)
        return self.logit_scale.exp() * image @ text.T
