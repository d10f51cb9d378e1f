"""Recipe: everything that decides the outcome of a few-shot run. One frozen, validated dataclass, without PyTorch.

The defaults are the recipe of CLIP-LoRA (Zanella & Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models",
CVPRW 2024, arXiv 2405.18541), the same for every data set and number of shots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..config import LoRAConfig
from .reading import Reading

__all__ = ["METHODS", "OWN", "PRECISIONS", "Recipe", "one_or_all", "prompts_for", "templates"]

METHODS = ("lora", "full", "linear-probe", "tip-adapter-f", "coop", "zero-shot")
# Classes are words to these, to the others rows of a matrix.
BY_WORDS = ("lora", "full", "coop", "zero-shot")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# Full fine-tuning at LoRA's rate destroys a pretrained CLIP; 1e-5 is the usual rate for it. CoOp's is that of its paper.
DEFAULT_LR = {"lora": 2e-4, "full": 1e-5, "coop": 2e-3}
ITERATIONS_PER_SHOT = 500
# As a template: the prompt that CoOp wrote for a set, which the paper does not use.
OWN = "own"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is adapted to a data set, from the images that are drawn to the last step.

    Args:
        model: an open_clip model, or "mini" for the one that comes with the package.
        pretrained: an open_clip tag, a checkpoint file, or None for random weights; "mini" has its own.
        quick_gelu: whether a checkpoint file was trained with QuickGELU, where it does not say so; None for what is known.
        method: "lora", "full" (full fine-tuning), "linear-probe" (logistic regression on frozen features), "tip-adapter-f" (a
            trained cache of the shots), "coop" (a learned context before the class names) or "zero-shot".
        shots: labelled images per class that are trained on.
        iterations: optimizer steps; None for 500 a shot.
        batch_size: images a step; the last batch of an epoch may be smaller.
        lr: peak learning rate; None for 2e-4, with full fine-tuning 1e-5, with coop 2e-3.
        lr_min: what the cosine ends at, stepped every iteration, without warm-up.
        weight_decay: AdamW's.
        betas: AdamW's.
        template: the prompt, with {} for the class name, or several, whose unit features are averaged; "own" for the one that
            CoOp wrote for the set; None for the paper's, "a photo of a {}." (digits have theirs).
        crop_scale: smallest and largest share of an image's area that a training crop takes.
        flip: mirror half of the training images; None for the data set's own (yes, but not for digits).
        max_side: training images whose shorter side is longer than this many pixels are shrunk once.
        seed: of the images drawn, their order, their crops, the adapters and dropout.
        kl_weight: lambda of lambda T² KL(zero-shot ‖ adapted), added to the loss; 0 for the paper's.
        kl_temperature: T, by which both logits are divided in it.
        lr_ratio: the learning rate of lora_B over that of lora_A (LoRA+); 1 for the paper's.
        average: the share of the last steps whose weights are averaged in the end; 0 for the paper's last weights.
        share_prefix: compute the first tokens that all prompts have in common once a step; with dropout they share its masks.
        base_to_new: train on the first half of the classes alone, test on each half by its own words.
        precision: "fp32", "bf16", "fp16" or "auto": bf16 on a GPU that has it, else fp16; fp32 on the CPU.
        lora: rank, alpha, dropout, targets, encoders, layers, scaling.
        reading: class names and columns of one's own, the share held out for validation.

    Raises:
        ValueError: a value outside its range, with the range.
    """

    model: str = "ViT-B-16"
    pretrained: str | None = "openai"
    quick_gelu: bool | None = None
    method: str = "lora"
    shots: int = 16
    iterations: int | None = None
    batch_size: int = 32
    lr: float | None = None
    lr_min: float = 1e-6
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    template: str | tuple[str, ...] | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool | None = None
    max_side: int = 512
    seed: int = 1
    kl_weight: float = 0.0
    kl_temperature: float = 8.0
    lr_ratio: float = 1.0
    average: float = 0.0
    share_prefix: bool = False
    base_to_new: bool = False
    precision: str = "auto"
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    reading: Reading = dataclasses.field(default_factory=Reading)

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("precision", self.precision, PRECISIONS)
        if self.base_to_new and not self.names_any_class:
            raise ValueError(
                f"base_to_new: {self.method} tells only the classes it was trained on; choose {', '.join(BY_WORDS)}"
            )
        for name in ("shots", "batch_size", "max_side"):
            _whole(name, getattr(self, name), 1)
        _whole("seed", self.seed, 0)
        if self.iterations is not None:
            _whole("iterations", self.iterations, 1)
        for name in ("learning_rate", "lr_min", "weight_decay"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name == "learning_rate" and value == 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.learning_rate < self.lr_min:
            raise ValueError(f"lr must be at least lr_min = {self.lr_min}, got {self.learning_rate}")
        if not all(0 <= beta < 1 for beta in self.betas) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.template not in (None, OWN):
            object.__setattr__(self, "template", one_or_all(templates(self.template or ())))
        self._check_options()
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be two rising shares in (0, 1], got {self.crop_scale}")

    def _check_options(self) -> None:
        """Raise ValueError for options beyond the paper's that are out of range, or that this method does not have."""
        if not math.isfinite(self.kl_weight) or self.kl_weight < 0:
            raise ValueError(f"kl_weight must be 0 or more, got {self.kl_weight}")
        for name in ("kl_temperature", "lr_ratio"):
            if not math.isfinite(value := getattr(self, name)) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value}")
        if not 0 <= self.average < 1:
            raise ValueError(f"average must be a share of the steps in [0, 1), got {self.average}")
        if self.lr_ratio != 1 and self.method != "lora":
            raise ValueError(f"lr_ratio is of lora_B over lora_A, which method {self.method} does not have")
        for name in ("kl_weight", "average"):
            if getattr(self, name) and not self.trains:
                raise ValueError(f"{name} needs a method with training steps, {self.method} has none")

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return ITERATIONS_PER_SHOT * self.shots if self.iterations is None else self.iterations

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return DEFAULT_LR.get(self.method, DEFAULT_LR["lora"]) if self.lr is None else self.lr

    @property
    def trains(self) -> bool:
        """Whether there is a training loop."""
        return self.method in ("lora", "full", "coop")

    @property
    def uses_frozen_features(self) -> bool:
        """Whether the method sees images as features of the frozen model, validation images among them."""
        return self.method in ("linear-probe", "tip-adapter-f")

    @property
    def names_any_class(self) -> bool:
        """Whether the adapted model classifies by words, so that it can be tested on classes it was not trained on."""
        return self.method in BY_WORDS

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1, …: lr_min + (lr - lr_min) (1 + cos(pi step / steps)) / 2."""
        return self.lr_min + (self.learning_rate - self.lr_min) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to config.json."""
        values = dataclasses.asdict(self)
        values["lora"] = self.lora.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote (lists as JSON gives them are accepted).

        Raises:
            ValueError: an option that Recipe does not have, or a value outside its range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown recipe option {unknown[0]!r}: known are {', '.join(sorted(known))}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if isinstance(plain.get("lora"), dict):
            plain["lora"] = LoRAConfig.from_dict(plain["lora"])
        if isinstance(plain.get("reading"), dict):
            plain["reading"] = Reading(**plain["reading"])
        return cls(**plain)


def templates(given: str | Sequence[str]) -> tuple[str, ...]:
    """One template or several as a tuple.

    Raises:
        ValueError: none, one without {}, or one twice.
    """
    several = (given,) if isinstance(given, str) else tuple(given)
    if not several:
        raise ValueError("template is empty: give at least one")
    for template in several:
        if not isinstance(template, str) or template.count("{}") != 1 or template.count("{") != 1:
            raise ValueError(f"template must hold {{}} once, where the class name goes, got {template!r}")
        if several.count(template) > 1:
            raise ValueError(f"template {template!r} is given twice")
    return several


def prompts_for(given: str | Sequence[str] | None, template: str, own: str | None) -> tuple[str, ...]:
    """The prompts of a data set with this `template` and, where it is one of CoOp's, CoOp's `own`, if a user gave `given`."""
    return templates((own or template) if given == OWN else given or template)


def one_or_all(several: tuple[str, ...]) -> str | tuple[str, ...]:
    """A tuple of one as that one, as config.json has it."""
    return several[0] if len(several) == 1 else several


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(allowed)}")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
