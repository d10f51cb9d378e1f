"""The worst images: those the model was surest of and wrong, and for each of the weakest classes those it trusted least."""

from __future__ import annotations

from collections.abc import Sequence

from ..datasets import Item
from ..images import thumbnail
from ..result import Result
from .html import percent, picture, section, text

__all__ = ["MOST_PICTURES", "shown", "surest", "weakest_classes"]

SIDE = 104
MOST_SURE, MOST_A_CLASS = 16, 2
WEAKEST, WORST = 6, 6
MOST_PICTURES = MOST_SURE + WEAKEST * WORST


def surest(after: Result, test: Sequence[Item]) -> str:
    """The mistakes with the highest confidence, at most two a class."""
    order = after.mistakes().tolist()
    chosen: list[int] = []
    seen: dict[int, int] = {}
    for i in order:
        label = int(after.labels[i])
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= MOST_A_CLASS and len(chosen) < MOST_SURE:
            chosen.append(i)
    if not chosen:
        return ""
    figures = "".join(
        shown(
            test[i],
            f"<b>{text(after.classes[after.predicted[i]])}</b>, {after.confidence[i]:.0%} sure<br>"
            f'<span class="soft">is {text(after.classes[after.labels[i]])}</span>',
        )
        for i in chosen
    )
    lead = (
        f"{len(order):,} of {len(after.labels):,} images are mistaken. These the model was surest of, at most two a class: look"
    )
    lead += " for wrong labels first."
    return section("mistakes", "The surest mistakes", lead, f'<div class="gallery">{figures}</div>')


def weakest_classes(after: Result, test: Sequence[Item]) -> str:
    """The classes with the lowest accuracy, each with the images whose true class got the least probability."""
    rows = [(accuracy, i) for i, (_, _, accuracy) in enumerate(after.per_class()) if accuracy is not None and accuracy < 100]
    counts = after.confusion()
    cases = []
    for accuracy, label in sorted(rows)[:WEAKEST]:
        own = (after.labels == label).nonzero()[:, 0]
        wrong = own[after.predicted[own] != label]
        order = wrong[after.truth[wrong].argsort(stable=True)].tolist()[:WORST]
        mistaken = counts[label].clone()
        mistaken[label] = 0
        top = [i for i in mistaken.argsort(descending=True, stable=True).tolist()[:3] if mistaken[i]]
        taken = ", ".join(f"{text(after.classes[i])} ({int(mistaken[i])})" for i in top)
        figures = "".join(
            shown(test[i], f'<span class="soft">{text(after.classes[after.predicted[i]])}, {after.confidence[i]:.0%}</span>')
            for i in order
        )
        cases.append(
            f'<div class="case"><div><b>{text(after.classes[label])}</b><p>{percent(accuracy)} of {len(own)} images</p>'
            f'<p class="soft">taken for {taken}</p></div><div class="strip">{figures}</div></div>'
        )
    if not cases:
        return ""
    lead = "Each with the images whose true class got the least probability, and what they were taken for."
    return section("weakest", "The weakest classes", lead, "".join(cases))


def shown(item: Item, caption: str) -> str:
    """What the model saw of an image, with a caption that is HTML."""
    return picture(thumbnail(item, SIDE), item.name, caption)
