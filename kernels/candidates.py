"""Every plan of the table's own parts that serves a call: what `fastlora.backend.measure` times against one another."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

from .tiles import TABLE, Call, Plan, choose

__all__ = ["FORMS", "Direction", "candidates"]

Direction = Literal["forward", "backward"]
FORMS: dict[Direction, tuple[str, ...]] = {
    "forward": ("one_pass_forward",),
    "backward": ("one_pass_backward", "da_in_epilogue"),
}


def candidates(call: Call, direction: Direction) -> list[Plan]:
    """The table's plan first, then its other forms of this direction, then the other rows that serve the call, each once."""
    plans = [choose(call)]
    forms = FORMS[direction]
    for flags in itertools.product((False, True), repeat=len(forms)):
        changes: dict[str, Any] = dict(zip(forms, flags, strict=True))
        plans.append(dataclasses.replace(plans[0], **changes))
    plans += [row.plan for row in TABLE if row.serves(call)]
    return list(dict.fromkeys(plans))
