"""What a run is told: the recipe, the data, where and how."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from . import datasets
from .engines import ENGINES
from .errors import UserError
from .images import IMAGES
from .recipe import Recipe

__all__ = ["NEW", "TEST", "Job"]

# What the tests of a run are called beside the names of other data sets.
TEST, NEW = "test", "new classes"


@dataclasses.dataclass(frozen=True)
class Job:
    """What to run and where; none of it changes the result but `recipe` and `data` (and the device, by rounding).

    Args:
        recipe: everything that decides the outcome.
        data: what `datasets.load` takes, or a Dataset (`datasets.from_torch` makes one), which is called by its name.
        root: where known sets are looked for.
        out: the folder of the run.
        device: "auto", "cpu", "cuda", "cuda:1", …
        resume: go on with the run in `out`.
        checkpoint_seconds, checkpoint_steps: a checkpoint this often, whichever comes first.
        again: the command that resumes the run.
        engine: how steps are carried out, one of engines.ENGINES.
        images: where training images are, one of images.IMAGES.
        microbatch: images at a time in the image tower, 0 for all; None for what is best on the device.
        brief: leave no report.html, no TensorBoard log and no fully trained model behind.
        also: other data sets, as `datasets.load` takes them, to test before and after: what does the model forget?

    Raises:
        ValueError: an unknown engine, or place for images; a negative microbatch.
    """

    recipe: Recipe
    data: str | datasets.Dataset
    out: Path
    root: Path = Path("data")
    device: str = "auto"
    resume: bool = False
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    again: str = "the same call with resume=True"
    engine: str = "auto"
    images: str = "auto"
    microbatch: int | None = None
    brief: bool = False
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.data, datasets.Dataset) and self.recipe.reading != datasets.Reading():
            raise UserError(f"data set {self.data.name} is read already: leave the recipe's reading as it is")
        if self.also and not self.recipe.names_any_class:
            raise UserError(f"--also: {self.recipe.method} tells only the classes it was trained on: leave --also out")
        if twice := next((data for i, data in enumerate(self.also) if data in (self.called, *self.also[:i])), None):
            raise UserError(f"--also {twice} is tested anyway: name other data sets, each once")
        for name, value, known in (("engine", self.engine, ENGINES), ("images", self.images, IMAGES)):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
        if self.microbatch is not None and self.microbatch < 0:
            raise ValueError(f"microbatch must be 0 (all images at once) or more, got {self.microbatch}")

    @property
    def called(self) -> str:
        """What config.json calls the data."""
        return self.data if isinstance(self.data, str) else self.data.name
