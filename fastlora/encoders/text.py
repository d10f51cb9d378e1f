"""Prompts to features: `encode_text` for one call, `TextEncoder` for the same prompts at every step."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Step, run_block
from .packing import PackedPrompts, pack, shared_prefix
from .towers import TextTower, first_live, in_place, seed_for, text_tower

__all__ = ["TextEncoder", "common_prefix", "encode_text"]


def encode_text(
    model: Any,
    tokens: Tensor,
    *,
    normalize: bool = False,
    seed: int | Tensor | None = None,
    ids: Tensor | None = None,
    share_prefix: bool | int = False,
) -> Tensor:
    """`model.encode_text(tokens)` without the padding.

    Equal to the host's own method in values and gradients, to rounding, with dropout on as well. Prompts are planned and packed
    at every call, which reads their lengths on the host; `TextEncoder` does so once.

    Args:
        model: an open_clip CLIP, CustomTextCLIP or CoCa, patched or not.
        tokens: (n, L) token ids, on the model's device.
        normalize: whether features get length 1.
        seed: int or int64 tensor of one element that keys the dropout masks; None draws one from torch's generator. Where the
            host's own method runs (`plan` says where), each layer draws its own.
        ids: (n,) integers, the identity of each prompt, default 0 … n-1: with the same seed a prompt with the same identity
            has the same masks in whatever batch. Keys the dropout masks only.
        share_prefix: compute the first tokens that all prompts have in common once, or so many of them (where these prompts are
            a part of more, as `fastlora.encoders.common_prefix` of all gives). The same result without dropout; with it
            the prompts share the masks of these tokens, those of prompt 0.

    Returns:
        (n, E), in the order of `tokens`.

    Raises:
        TypeError: a model of another family.
        ValueError: tokens or ids of another shape, or a share_prefix longer than what the prompts share.
    """
    return TextEncoder(model, tokens, ids=ids, share_prefix=share_prefix, keep=False)(seed, normalize=normalize)


class TextEncoder:
    """The same prompts at every step: planned and packed once, and what no adapter touches computed once.

    What lies below the lowest block that is trained is kept as long as its weights are unchanged; the whole tower where nothing
    in it is trained. Make it once the model is on its device; patching, merging, train() and hooks may follow later.

    Args:
        model: an open_clip CLIP, CustomTextCLIP or CoCa, patched or not.
        tokens: (n, L) token ids, on the model's device.
        ids, share_prefix: as for `encode_text`.
        keep: whether to keep what is frozen.

    Raises:
        TypeError, ValueError: as for `encode_text`.
    """

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        *,
        ids: Tensor | None = None,
        share_prefix: bool | int = False,
        keep: bool = True,
    ) -> None:
        if tokens.ndim != 2 or tokens.dtype.is_floating_point:
            raise ValueError(f"tokens must be integers (n, L), got {tokens.dtype} {tuple(tokens.shape)}")
        if ids is not None and (ids.shape != tokens.shape[:1] or ids.dtype.is_floating_point):
            raise ValueError(f"ids must be ({len(tokens)},) integers, got {ids.dtype} {tuple(ids.shape)}")
        self.model, self.tokens, self.keep = model, tokens, keep
        self._kept: tuple[tuple[object, ...], Tensor] | None = None
        self._tower = text_tower(model)
        self._packed = _pack(self._tower, tokens, ids, share_prefix) if isinstance(self._tower, TextTower) else None

    def __call__(self, seed: int | Tensor | None = None, *, normalize: bool = False) -> Tensor:
        """Features (n, E) of the prompts, in the order given. `seed` and `normalize` as for `encode_text`."""
        tower, packed = in_place(self._tower, self.model), self._packed
        if packed is None or tower is None:
            return self.model.encode_text(self.tokens, normalize=normalize)
        seed = seed_for(tower.blocks, seed, packed.rows.device)
        step = Step(seed, packed.rows, tower.host.transformer.grad_checkpointing)
        if self.keep and not any(p.requires_grad for p in tower.embedding_parameters()):
            below = first_live(tower.blocks)
            x = _blocks(tower, packed, self._frozen(tower, packed, below), step, below)
        else:
            x = _blocks(tower, packed, tower.embed(packed.tokens, packed.positions), step)
        features = tower.head(x).index_select(0, packed.order)
        return F.normalize(features, dim=-1) if normalize else features

    def _frozen(self, tower: TextTower, packed: PackedPrompts, below: int) -> Tensor:
        """The rows after the first `below` blocks, computed again only when a weight they depend on has changed."""
        weights = itertools.chain(tower.embedding_parameters(), *(b.parameters() for b in tower.blocks[:below]))
        # a parameter changed in place has another version, one replaced or moved another address
        key = (below, *((w.data_ptr(), w._version, w.dtype) for w in weights), _autocast(packed.rows.device.type))
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                x = tower.embed(packed.tokens, packed.positions)
                self._kept = key, _blocks(tower, packed, x, Step(None, packed.rows), 0, below)
        return self._kept[1]


def common_prefix(model: Any, tokens: Tensor) -> int:
    """How many first tokens of the prompts (n, L) `share_prefix` computes once; 0 where the tower has no such form."""
    tower = text_tower(model)
    if not isinstance(tower, TextTower) or not tower.causal or (lengths := tower.lengths(tokens)) is None:
        return 0
    return shared_prefix(tokens, lengths)


def _pack(tower: TextTower, tokens: Tensor, ids: Tensor | None, share_prefix: bool | int) -> PackedPrompts | None:
    """None where the host's own method must run: no prompts, too long ones, or such as a short form does not fit."""
    if len(tokens) == 0 or tokens.shape[1] != tower.context - tower.class_token or (lengths := tower.lengths(tokens)) is None:
        return None
    prefix = 0
    if share_prefix and tower.causal:
        prefix = shared_prefix(tokens, lengths)
        if share_prefix is not True:
            if share_prefix > (prefix if len(tokens) > 1 else int(lengths[0]) - 1):
                raise ValueError(f"share_prefix={share_prefix}, but these prompts share {prefix} first tokens")
            prefix = share_prefix
    ids = torch.arange(len(tokens)) if ids is None else ids
    reader = tokens.shape[1] if tower.class_token else None
    return pack(tokens, lengths, ids, context=tower.context, causal=tower.causal, prefix=prefix, reader=reader)


def _blocks(tower: TextTower, packed: PackedPrompts, x: Tensor, step: Step, first: int = 0, end: int | None = None) -> Tensor:
    """The blocks first … end-1 on x; the last one of the tower for the pooled rows alone."""
    last = len(tower.blocks) - 1
    for index, block in enumerate(tower.blocks[first:end], first):
        x = run_block(block, x, packed.sequences, step, packed.pooled if index == last else None)
    return x


def _autocast(device: str) -> object:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
