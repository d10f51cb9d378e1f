"""Prompts as the text encoder gets them: those that are cut at its context length, and classes that become one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .models import LoadedModel

__all__ = ["remarks"]


def remarks(loaded: LoadedModel, templates: Sequence[str], classes: Sequence[str], tokens: Tensor) -> list[str]:
    """Return a note on classes whose prompts are the same tokens, and one on prompts that are cut, where there are such.

    Classes of the same tokens have one text feature: no image is told apart by them. It is no error, because published sets
    have such classes (CoOp's names for ImageNet among them) and are to be measured as they are.

    Args:
        tokens: int64 (classes, templates, length), what `loaded.tokenise` gives.
    """
    first: dict[bytes, str] = {}
    alike = []
    for name, row in zip(classes, tokens, strict=True):
        key = row.numpy().tobytes()
        if key in first:
            alike.append((first[key], name))
        first.setdefault(key, name)
    cut = _cut(loaded, [template.format(name) for name in classes for template in templates], tokens.flatten(0, 1))
    length, notes = tokens.shape[-1], []
    if alike:
        why = f", some after a cut at {length} tokens" if cut else ""
        one, other = (_short(name) for name in alike[0])
        notes.append(
            f"classes that cannot be told apart, because their prompts are the same tokens{why}: {len(alike)}, the first is"
            f" {other!r}, the same as {one!r}: give them other names by --class-names FILE"
        )
    if cut:
        notes.append(f"prompts cut at {length} tokens, the context length: {len(cut)}, the first is {_short(cut[0])!r}")
    return notes


def _cut(loaded: LoadedModel, prompts: Sequence[str], tokens: Tensor) -> list[str]:
    """The prompts that would be other tokens if there were room for more."""
    full = [i for i, last in enumerate(tokens[:, -1].tolist()) if last != 0]  # whatever ends in padding is whole
    if not full:
        return []
    length = tokens.shape[-1]
    whole = loaded.tokenizer([prompts[i] for i in full], context_length=2 * length)[:, :length]  # type: ignore[call-arg]
    return [prompts[i] for i, row in zip(full, whole, strict=True) if not row.equal(tokens[i])]


def _short(text: str, most: int = 60) -> str:
    """Both ends of a long text: what tells it from others may be at the end."""
    return text if len(text) <= most else f"{text[: most // 2].rstrip()} … {text[-most // 2 :].lstrip()}"
