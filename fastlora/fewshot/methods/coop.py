"""CoOp: the words around a class name are learned vectors, the same for all classes; both encoders stay as they are.

As in Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, arXiv 2109.01134: 16 vectors before the name,
drawn with a standard deviation of 0.02. They are trained by this package's loop: AdamW where the paper has SGD, and the
recipe's number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["LENGTH", "NAMES", "ContextEmbedding", "load", "place", "save"]

LENGTH = 16
# What follows the context.
NAMES = "{}."


class ContextEmbedding(nn.Module):
    """A token embedding in which the ids `slots` stand for learned vectors: `context`, fp32 (len(slots), width)."""

    slot: Tensor

    def __init__(self, host: nn.Embedding, slots: Sequence[int]) -> None:
        super().__init__()
        self.weight = host.weight
        slot = torch.full((host.num_embeddings,), -1)
        slot[list(slots)] = torch.arange(len(slots))
        self.register_buffer("slot", slot.to(host.weight.device), persistent=False)
        width, device = host.embedding_dim, host.weight.device
        self.context = nn.Parameter(torch.empty(len(slots), width, dtype=torch.float32, device=device).normal_(std=0.02))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to (…, width), in the table's dtype."""
        rows, slot = F.embedding(ids, self.weight), self.slot[ids]
        return torch.where((slot >= 0).unsqueeze(-1), self.context[slot.clamp(min=0)].to(rows.dtype), rows)


def place(model: Any, tokens: Sequence[Tensor]) -> tuple[ContextEmbedding, list[Tensor], Callable[[], None]]:
    """Give `model` a context, the only thing that is trained, and the prompts room for it.

    Args:
        model: an open_clip model that embeds tokens by `token_embedding`.
        tokens: class names alone (`NAMES`), int64 (…, L), of every test.

    Returns:
        The embedding, the tokens with the context after their first one, and a function that takes the context away again.

    Raises:
        UserError: another kind of model, or a name that leaves no room.
    """
    host = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    table = getattr(host, "token_embedding", None)
    if not isinstance(table, nn.Embedding):
        raise UserError("coop needs an open_clip model with a token_embedding of its own")
    used = set(torch.cat([t.flatten() for t in tokens]).unique().tolist())
    # ids below the end-of-text token that no prompt uses; 0 pads
    slots = [i for i in range(table.num_embeddings - 3, 0, -1) if i not in used][:LENGTH]
    placed = [_insert(t, torch.tensor(slots, device=t.device)) for t in tokens]
    model.requires_grad_(False)
    embedding = ContextEmbedding(table, slots)
    host.token_embedding = embedding  # type: ignore[union-attr]

    def undo() -> None:
        host.token_embedding = table  # type: ignore[union-attr]

    return embedding, placed, undo


def _insert(tokens: Tensor, slots: Tensor) -> Tensor:
    if bool((tokens[..., -len(slots) :] != 0).any()):
        room = tokens.shape[-1] - len(slots)
        raise UserError(f"coop: a class name takes more than the {room} tokens that {len(slots)} context vectors leave")
    context = slots.expand(*tokens.shape[:-1], -1)
    return torch.cat([tokens[..., :1], context, tokens[..., 1 : -len(slots)]], -1)


def save(embedding: ContextEmbedding, path: Path) -> None:
    """Write the context alone."""
    from safetensors.torch import save_file

    save_file({"context": embedding.context.detach().cpu().contiguous()}, path)


@torch.no_grad()
def load(embedding: ContextEmbedding, path: Path) -> None:
    """Read what `save` wrote.

    Raises:
        UserError: a damaged file, or the context of another model.
    """
    from safetensors.torch import load_file

    try:
        context = load_file(path)["context"]
    except Exception as error:  # safetensors raises its own type
        raise UserError(f"{path} is not a context that coop saved: {error}") from error
    if context.shape != embedding.context.shape:
        raise UserError(f"{path} holds a context of {tuple(context.shape)}, the model takes {tuple(embedding.context.shape)}")
    embedding.context.copy_(context)
