"""Ways of adapting one open_clip model, each a small module, so that every ratio is measured side by side in one run."""

from __future__ import annotations

from .common import Adapters, Job, Trainee, few_prompts, host, inputs, prompts, starting_adapters
from .frozen import Frozen
from .full import FullFineTuning
from .library import FastLoRA
from .paper import Paper
from .peft import Peft
from .textbook import Textbook

__all__ = ["TRAINEES", "Adapters", "Job", "Trainee", "few_prompts", "host", "inputs", "prompts", "starting_adapters"]

TRAINEES: dict[str, type[Trainee]] = {t.name: t for t in (Frozen, FastLoRA, Textbook, Paper, Peft, FullFineTuning)}
