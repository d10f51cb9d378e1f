"""Drop-in modules: the host's own parameters under their own names, plus lora_A and lora_B.

A drop-in takes the place of one module instance. It shares the host's parameters, buffers, hooks and state_dict keys, so
optimizers, checkpoints and `model.to()` go on working, and the host can be put back as it was.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig, OpSpec
from .functional import lora_linear

__all__ = ["LoRALayer", "LoRALinear", "LoRAMultiheadAttention", "adopt"]


class LoRALayer(nn.Module):
    """What both drop-ins share: the adapter of one weight (N, K), its constants, merging.

    Parameters: lora_A (g, R, K) and lora_B (g · N/G, R), fp32, for the g active of G groups; None where no group is active
    (an attention that stands in only so that its out_proj's adapter is not passed over).
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    spec: OpSpec
    backend: str | None
    _frozen_weight: Tensor | None

    @property
    def base_weight(self) -> Tensor:
        """The frozen weight (N, K) that the adapter updates."""
        raise NotImplementedError

    def _attach(self, config: LoRAConfig, site: int, active: tuple[bool, ...]) -> None:
        n, k = self.base_weight.shape
        self.spec = OpSpec(config.scale, config.dropout, site, tuple(range(len(active))), active)
        self.backend = config.backend
        self.register_buffer("_frozen_weight", None, persistent=False)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        if not self.adapted:
            return
        device, g = self.base_weight.device, sum(active)
        # kaiming_uniform(a=√5) of each (R, K), as loralib and the paper: bound 1/√K
        a = torch.empty(g, config.rank, k, device=device).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k))
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(g * (n // len(active)), config.rank, device=device))

    @property
    def adapted(self) -> bool:
        """Whether any group has an adapter."""
        return any(self.spec.active)

    def adapters(self) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A and lora_B of a layer that is `adapted`."""
        assert self.lora_A is not None and self.lora_B is not None, "no group of this layer is active"
        return self.lora_A, self.lora_B

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the adapter's update at present."""
        return self._frozen_weight is not None

    def delta(self) -> Tensor:
        """scale · B A of every group, zero where a group has no adapter: (N, K), fp32."""
        weight = self.base_weight
        delta = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        lora_a, lora_b = self.adapters()
        for (_, rows), a, b in zip(self.spec.spans(len(weight)), lora_a, lora_b.chunk(len(lora_a)), strict=True):
            delta[rows] = self.spec.scale * (b.float() @ a.float())
        return delta

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to the base weight, summed in fp32; the weight as it was is kept for `unmerge`."""
        if self.adapted and not self.merged:
            frozen = self.base_weight.detach().clone()
            self.base_weight.copy_(frozen.float() + self.delta())
            self._frozen_weight = frozen

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the base weight bit for bit."""
        if self._frozen_weight is not None:
            self.base_weight.copy_(self._frozen_weight)
            self._frozen_weight = None

    def _project(
        self, x: Tensor, bias: Tensor | None, seed: Tensor | None, rows: Tensor | None, groups: slice = slice(None)
    ) -> Tensor:
        """The op on the chosen groups (a slice of the G groups: q alone is slice(0, 1))."""
        weight: Tensor = self.base_weight
        spec = self.spec
        active = spec.active[groups]
        if active != spec.active:
            width = len(weight) // len(spec.active)
            span = slice((groups.start or 0) * width, (groups.start or 0) * width + len(active) * width)
            weight, bias = weight[span], None if bias is None else bias[span]
        if self.merged or not any(active):
            if self.merged and self.training and torch.is_grad_enabled() and self.adapters()[1].requires_grad:
                raise RuntimeError("a merged adapter cannot be trained: call fastlora.unmerge(model) first")
            return F.linear(x, weight, bias)
        lora_a: Tensor
        lora_b: Tensor
        lora_a, lora_b = self.adapters()
        if active != spec.active:
            width = len(lora_b) // len(lora_a)
            first = sum(spec.active[: groups.start or 0])
            lora_a, lora_b = lora_a[first : first + sum(active)], lora_b[first * width : (first + sum(active)) * width]
        return lora_linear(
            x, weight, bias, lora_a, lora_b, scale=spec.scale, dropout=spec.dropout if self.training else 0.0, seed=seed,
            site=spec.site, rows=rows, groups=spec.groups[groups], active=active, backend=self.backend,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # a plain checkpoint of the host loads with strict=True: the adapter stays as it is
        if self.adapted:
            for name, parameter in zip(("lora_A", "lora_B"), self.adapters(), strict=True):
                state_dict.setdefault(prefix + name, parameter.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()] if super().extra_repr() else []
        if self.adapted:
            parts.append(f"lora rank={self.adapters()[0].shape[1]}, groups={sum(self.spec.active)}/{len(self.spec.active)}")
        return ", ".join(parts)


class LoRALinear(LoRALayer, nn.Linear):
    """nn.Linear with an adapter; with G groups, one packed q, k, v projection."""

    @property
    def base_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor, *, seed: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (..., K) -> (..., N). `seed` and `rows` key the dropout mask as in `fastlora.lora_linear`."""
        return self._project(x, self.bias, seed, rows)


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with adapters on its packed q, k, v; the options of the host behave as its own."""

    @property
    def base_weight(self) -> Tensor:
        return self.in_proj_weight

    def project_qkv(self, x: Tensor, *, seed: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (..., D) -> q, k, v side by side (..., 3D)."""
        return self._project(x, self.in_proj_bias, seed, rows)

    def project_group(
        self, x: Tensor, first: int, last: int, *, seed: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Only the projections first … last-1 of (q, k, v): x (..., D) -> (..., (last-first)·D)."""
        return self._project(x, self.in_proj_bias, seed, rows, slice(first, last))

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
        same = query is key and key is value
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        if not same:  # self-attention on copies stays one packed product only where the tensors are the same object
            seed = self._shared_seed(query)
            parts = [self.project_group(t, i, i + 1, seed=seed) for i, t in enumerate((query, key, value))]
        else:
            parts = list(self.project_qkv(query).chunk(3, -1))
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in parts)

        mask = self._attention_mask(attn_mask, key_padding_mask, q, k)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            out = weights @ v
        else:
            weights = None
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))

        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        if not batched:
            return out[0], weights
        return (out if self.batch_first else out.transpose(0, 1)), weights

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


def refusal(host: nn.Module) -> str | None:
    """Why `host` cannot be adapted, or None."""
    if isinstance(host, LoRALayer):
        return "it has an adapter already"
    if isinstance(host, nn.MultiheadAttention):
        if not host._qkv_same_embed_dim:
            return "its keys or values have a width of their own (kdim, vdim)"
        if host.bias_k is not None or host.add_zero_attn:
            return "it adds a bias or zeros to keys and values (add_bias_kv, add_zero_attn)"
        return None
    return None if isinstance(host, nn.Linear) else f"it is a {type(host).__name__}, not a Linear or MultiheadAttention"


def adopt(host: nn.Module, config: LoRAConfig, *, site: int, active: tuple[bool, ...]) -> LoRALayer:
    """A drop-in for `host` that shares its parameters, buffers, submodules and hooks; `host` is left as it is.

    Args:
        host: nn.Linear or nn.MultiheadAttention for which `refusal` is None.
        site: which layer this is; keys the dropout mask.
        active: for each group of the weight's rows whether it gets an adapter.

    Raises:
        ValueError: the rank is above the smaller side of a group's weight.
    """
    cls: type[LoRALayer] = LoRAMultiheadAttention if isinstance(host, nn.MultiheadAttention) else LoRALinear
    layer = cls.__new__(cls)
    layer.__dict__.update(host.__dict__)
    for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        layer.__dict__[registry] = host.__dict__[registry].copy()
    n, k = layer.base_weight.shape
    if config.rank > min(n // len(active), k):
        raise ValueError(f"rank {config.rank} is above the width: a weight here is {(n // len(active), k)}")
    layer._attach(config, site, active)
    return layer


def release(layer: LoRALayer, host: nn.Module) -> None:
    """Hand the layer's present parameters, buffers and mode back to `host`, which may have been left behind by a swap."""
    for registry in ("_parameters", "_buffers"):
        ours, theirs = layer.__dict__[registry], host.__dict__[registry]
        theirs.update({name: ours[name] for name in theirs})
    host.train(layer.training)
