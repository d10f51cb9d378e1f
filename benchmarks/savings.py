"""What each saving of a step is worth: the step with one taken away, beside the step that has all; and all together."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from baselines import TRAINEES, Job, Trainee
from baselines.library import FastLoRA, Patched
from fastlora import products, thin
from fastlora.encoders import blocks, image, short_attention, text
from fastlora.fewshot import memory
from measure import summary
from memory import counts, ready
from steps import in_turn, seconds_whole

Without = Callable[[], contextlib.AbstractContextManager[object]]


class HostText(FastLoRA):
    """The text tower as the host runs it: every prompt at 77 tokens."""

    text_features = Patched.text_features


class HostImage(FastLoRA):
    """The image tower as the host runs it."""

    image_features, in_parts = Patched.image_features, False


class AllImages(FastLoRA):
    """All images at once."""

    in_parts = False


@contextlib.contextmanager
def _instead(replacement: Any, *places: tuple[Any, str]) -> Any:
    """Within: `replacement` stands for these attributes of modules."""
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _all_tokens(block: Any, x: Tensor, sequences: Any, step: Any, pooled: Tensor | None = None) -> Tensor:
    y = blocks.run_block(block, x, sequences, step)
    return y if pooled is None else y.index_select(0, pooled)


def _never(*_: object) -> bool:
    return False


def _kept(*_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


# what is taken away -> the contestant, and what stands in its place during a step
SAVINGS: dict[str, tuple[type[Patched], Without]] = {
    "nothing": (FastLoRA, contextlib.nullcontext),
    "prompts end to end without padding (the host's text tower)": (HostText, contextlib.nullcontext),
    "the image tower's savings (the host's image tower)": (HostImage, contextlib.nullcontext),
    "the last blocks for pooled tokens alone": (
        FastLoRA, lambda: _instead(_all_tokens, (text, "run_block"), (image, "run_block"))
    ),
    "frozen MLPs some rows at a time": (FastLoRA, lambda: _instead(_never, (blocks, "serves"))),
    "images some at a time": (AllImages, contextlib.nullcontext),
    "oneDNN's products": (FastLoRA, lambda: _instead(_never, (products, "_onednn"))),
    "compiled products with R columns": (FastLoRA, lambda: _instead(_never, (thin, "serves"))),
    "compiled attention over short sequences": (FastLoRA, lambda: _instead(_never, (short_attention, "serves"))),
    "LayerNorm computed again in backward": (FastLoRA, lambda: _instead(_kept, (blocks, "_recomputed"))),
}  # fmt: skip
TOGETHER = {"all of these": "fastlora, host's encoders", "those, and the packed q, k, v": "textbook"}


def _seconds(contestant: Trainee, without: Without, number: int) -> float:
    with without():
        return seconds_whole(contestant, number)


def savings(job: Job, rounds: int) -> list[dict[str, Any]]:
    """A row for each: the time of a step, the contestants taking turns, and the bytes saved for backward."""
    memory.keep_freed()
    cases: dict[str, tuple[Any, Without]] = {}
    whole = ready(FastLoRA, job)
    for name, (trainee, without) in SAVINGS.items():
        cases[name] = (whole if trainee is FastLoRA else ready(trainee, job), without)
    for name, contestant in TOGETHER.items():
        cases[name] = (ready(TRAINEES[contestant], job), contextlib.nullcontext)
    taken = in_turn({name: partial(_seconds, *case) for name, case in cases.items()}, rounds, f"{job.name}, without")
    rows = []
    for name, (contestant, without) in cases.items():
        with without():
            counted = counts(contestant)
        timing = summary(taken[name].seconds, "clock")
        over = timing.median / statistics.median(taken["nothing"].seconds)
        row = {"row": "savings", **job.row(), "without": name, **timing.row(), **taken[name].row()}
        rows.append(row | {"over_all": over, **counted})
    return rows
