"""Ways of adapting one open_clip model, each a small module, so that every ratio is measured side by side in one run."""

from __future__ import annotations

from .common import Adapters, Job, Trainee, few_prompts, host, inputs, prompts, starting_adapters
from .cublas import CublasBeta
from .frozen import Frozen
from .full import FullFineTuning
from .library import CompiledFastLoRA, FastLoRA, Patched, SharedPrefix
from .paper import Paper
from .peft import Peft
from .textbook import CompiledTextbook, Textbook

__all__ = ["TRAINEES", "Adapters", "Job", "Trainee", "few_prompts", "host", "inputs", "prompts", "starting_adapters"]

TRAINEES: dict[str, type[Trainee]] = {
    trainee.name: trainee
    for trainee in (
        Frozen, FastLoRA, SharedPrefix, Patched, CompiledFastLoRA, CublasBeta, Textbook, CompiledTextbook, Paper, Peft,
        FullFineTuning,
    )
}  # fmt: skip
