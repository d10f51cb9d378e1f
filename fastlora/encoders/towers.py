"""What the encoders know of an open_clip model: its towers as embedding, blocks and head, or why the host's own method runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..functional import seed_tensor
from ..layers import LoRALayer
from .obstacles import obstacle, replaced

__all__ = ["Plan", "TextTower", "VisionTower", "first_live", "in_place", "plan", "seed_for", "text_tower", "vision_tower"]

T = TypeVar("T", "TextTower", "VisionTower")
_POOLS = ("first", "last", "argmax", "eos")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `encode_text` and `encode_image` do for a model, in words, and why not more."""

    text: str
    vision: str


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text tower of residual attention blocks.

    Args:
        host: the module with token_embedding, positional_embedding and text_projection: the CLIP model or its .text.
        blocks: from bottom to top.
        causal: whether a token reads only itself and those before it, so that tokens after the pooled one can be left out.
        pool: which token becomes the feature: "first", "last", "argmax" or "eos".
        eos: token id for pool "eos".
        class_token: whether a class token is read after the prompt (CoCa).
    """

    host: Any
    blocks: tuple[Any, ...]
    causal: bool
    pool: str
    eos: int | None
    class_token: bool

    def obstacle(self, model: Any) -> str | None:
        """Why the host's own method must run on `model` now, or None: cheap enough for every call."""
        host: Any = model if self.host is model else model.text
        if host is not self.host or tuple(host.transformer.resblocks) != self.blocks:
            return "its text tower was replaced"
        projection = [host.text_projection] if isinstance(host.text_projection, nn.Module) else []
        parts = [host.token_embedding, host.transformer, host.ln_final, *projection] if host is model else [host]
        return _replaced(model, "encode_text", "_encode_text") or obstacle(parts)

    @property
    def context(self) -> int:
        """Tokens of a whole prompt, the class token included."""
        return len(self.host.positional_embedding)

    def lengths(self, tokens: Tensor) -> Tensor | None:
        """How many first tokens of each prompt (n, L) are needed, (n,); None where the prompts do not fit the short form."""
        whole = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        if self.class_token:
            # legacy mask, shifted by one: the class token reads a key whose token before it is no pad, and not itself
            filled = tokens != self.host.pad_id
            lengths = filled.sum(1)
            one_block = (filled == (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])).all()
            short = bool(one_block & (lengths < tokens.shape[1]).all())
            return lengths + 1 if short else None
        if self.pool == "last":
            return whole
        if self.pool == "argmax":
            pooled = tokens.argmax(1)
        elif self.pool == "eos":
            pooled = torch.eq(tokens, self.eos if self.eos is not None else -1).int().argmax(1)
        else:
            pooled = torch.zeros_like(whole)
        return pooled + 1

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(M,) token ids and positions -> (M, D), in the tower's dtype."""
        dtype = self.blocks[0].get_weight_dtype()
        table = self.host.token_embedding
        if self.class_token:
            embedded = table(tokens.clamp(min=0)).to(dtype)
            embedded = torch.where(tokens[:, None] < 0, self.host.cls_emb.to(dtype), embedded)
        else:
            embedded = table(tokens).to(dtype)
        return embedded + self.host.positional_embedding.to(dtype)[positions]

    def embedding_parameters(self) -> Iterable[nn.Parameter]:
        """What `embed` reads."""
        yield from self.host.token_embedding.parameters()
        yield self.host.positional_embedding
        if self.class_token:
            yield self.host.cls_emb

    def head(self, x: Tensor) -> Tensor:
        """Pooled rows (n, D) -> features (n, E)."""
        x = self.host.ln_final(x)
        projection = self.host.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """A vision transformer of residual attention blocks; `pooled`: whether its class token alone becomes the feature."""

    host: Any
    blocks: tuple[Any, ...]
    pooled: bool

    def obstacle(self, model: Any) -> str | None:
        """Why the host's own method must run on `model` now, or None: cheap enough for every call."""
        if model.visual is not self.host or tuple(self.host.transformer.resblocks) != self.blocks:
            return "its vision tower was replaced"
        return _replaced(model, "encode_image", "_encode_image") or obstacle([self.host])

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, D)."""
        return self.host._embeds(images)

    def head(self, x: Tensor) -> Tensor:
        """Class tokens (B, D) where `pooled`, else all tokens (B, L, D) -> features (B, E)."""
        x = self.host.ln_post(x) if self.pooled else self.host._pool(x)[0]
        return x if self.host.proj is None else x @ self.host.proj


def plan(model: nn.Module) -> Plan:
    """For each tower of an open_clip model what is saved, and why not more.

    Raises:
        TypeError: not an open_clip CLIP, CustomTextCLIP or CoCa.
    """
    text, vision = text_tower(model), vision_tower(model)
    if isinstance(text, TextTower):
        if text.class_token:
            said = "packed, with one pad and the class token at its own position; a prompt that fills the context runs whole"
        elif not text.causal:
            said = "all tokens kept: the tower is bidirectional, so a prompt sees its padding"
        elif text.pool == "last":
            said = "all tokens kept: the last one is pooled"
        else:
            said = "packed: each prompt ends with its pooled token"
        text_said = said + "; last block for the pooled token alone"
    else:
        text_said = f"the host's own method: {text}"
    if isinstance(vision, VisionTower):
        pooled = "last block for the class token alone"
        vision_said = pooled if vision.pooled else "all blocks whole: the pooling reads all tokens"
    else:
        vision_said = f"the host's own method: {vision}"
    return Plan(text_said, vision_said)


def text_tower(model: Any) -> TextTower | str:
    """The text tower, or why the host's own method must run.

    Raises:
        TypeError: not an open_clip CLIP, CustomTextCLIP or CoCa.
    """
    from open_clip.transformer import TextTransformer

    if (why := _overrides(model, "encode_text")) is not None:
        return why
    host = getattr(model, "text", None)
    if host is None:
        host, pool, eos = model, model.text_pool_type, getattr(model, "text_eos_id", None)
    elif type(host) is not TextTransformer:
        return f"{type(host).__name__} is not open_clip's TextTransformer"
    else:
        pool, eos = host.pool_type, host.eos_id
    if (why := _refused(host.transformer)) is not None:
        return why
    class_token = getattr(host, "cls_emb", None) is not None
    if pool not in _POOLS and not class_token:
        return f"its pooling {pool!r} gives all tokens"
    if getattr(host, "use_pad_mask", False) or (class_token and host.correct_cls_mask):
        return "it masks its padding"
    causal = host.attn_mask is not None
    if class_token and not causal:
        return "it masks its padding"
    if causal and not _is_causal(host.attn_mask):
        return "its attention mask is not the causal one"
    tower = TextTower(host, tuple(host.transformer.resblocks), causal, pool, eos, class_token)
    return tower.obstacle(model) or tower


def vision_tower(model: Any) -> VisionTower | str:
    """The vision tower, or why the host's own method must run.

    Raises:
        TypeError: not an open_clip CLIP, CustomTextCLIP or CoCa.
    """
    from open_clip.transformer import VisionTransformer

    if (why := _overrides(model, "encode_image")) is not None:
        return why
    host = model.visual
    if type(host) is not VisionTransformer:
        return f"{type(host).__name__} is not open_clip's VisionTransformer"
    if (why := _refused(host.transformer)) is not None:
        return why
    tower = VisionTower(host, tuple(host.transformer.resblocks), host.attn_pool is None and host.pool_type == "tok")
    return tower.obstacle(model) or tower


def in_place(tower: T | str, model: nn.Module) -> T | None:
    """The tower of `model` that was found before, None where there was none or the host's own method must run by now."""
    if isinstance(tower, str):
        return None
    # a graph holds what was there when it was made
    return tower if torch.compiler.is_compiling() or tower.obstacle(model) is None else None


def first_live(blocks: Iterable[Any]) -> int:
    """How many blocks from the bottom give the same result at every step: nothing in them is trained or drops out."""
    below = 0
    for block in blocks:
        if any(p.requires_grad for p in block.parameters()) or any(map(_draws, block.modules())):
            break
        below += 1
    return below


def seed_for(blocks: Iterable[Any], seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """The one seed that all layers of a forward pass get, drawn where none is given; None where no adapter drops out."""
    if any(_draws(module) for block in blocks for module in block.modules()):
        return seed_tensor(seed, device)
    return None


def _draws(module: nn.Module) -> bool:
    return (
        isinstance(module, LoRALayer)
        and module.training
        and module.spec.dropout > 0
        and any(module.spec.active)
        and not module.merged
    )


def _known(model: nn.Module) -> Any:
    """The open_clip class whose methods `model` has."""
    from open_clip import CLIP, CoCa, CustomTextCLIP

    for known in (CLIP, CustomTextCLIP, CoCa):
        if isinstance(model, known):
            return known
    raise TypeError(
        f"encode_text and encode_image know open_clip's CLIP, CustomTextCLIP and CoCa, not {type(model).__qualname__}:"
        " call the model's own methods"
    )


def _overrides(model: nn.Module, name: str) -> str | None:
    """Why the method `name` cannot be stood in for: the model, or a subclass of open_clip's, has one of its own; or None."""
    known = _known(model)
    if getattr(type(model), name) is not getattr(known, name):
        return f"{type(model).__name__} has an {name} of its own"
    return None


def _replaced(model: nn.Module, *methods: str) -> str | None:
    name = replaced(model, *methods)
    return None if name is None else f"{type(model).__name__} has an {name} of its own"


def _refused(transformer: Any) -> str | None:
    """Why the blocks of `transformer` cannot be run one by one on packed rows, or None."""
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    if type(transformer) is not Transformer:
        return f"{type(transformer).__name__} is not open_clip's Transformer"
    for block in transformer.resblocks:
        if type(block) is not ResidualAttentionBlock or hasattr(block, "ln_1_kv"):
            return f"its blocks are {type(block).__name__}, not open_clip's plain ResidualAttentionBlock"
        attention = block.attn
        if not isinstance(attention, nn.MultiheadAttention) or not attention._qkv_same_embed_dim:
            return f"its blocks attend with {type(attention).__name__}, not a packed nn.MultiheadAttention"
        if attention.bias_k is not None or attention.add_zero_attn:
            return "its attention adds a bias or zeros to keys and values"
    return None


def _is_causal(mask: Tensor) -> bool:
    size = len(mask)
    causal = torch.full((size, size), float("-inf"), dtype=torch.float32, device=mask.device).triu_(1)
    return mask.shape == (size, size) and bool(torch.equal(mask.float(), causal))
