"""Reading: how a user's data set is read where common habits do not fit; part of a recipe, without PyTorch."""

from __future__ import annotations

import dataclasses

__all__ = ["Reading"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How to read DATA; the defaults read every source that follows common habits.

    Args:
        class_names: a file with the names of the classes, one a line in the order of the labels, or lines of label, tab, name.
        image_column: what holds the image: a column of a table or a Hugging Face set, the ending of WebDataset's files.
        label_column: what holds the label; of WebDataset an ending, or a key of its .json files.
        split_column: what holds train, val or test.
        validation: the share of each class's training images that becomes the validation split where a set has none.

    Raises:
        ValueError: a share outside [0, 1), an empty name.
    """

    class_names: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    validation: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be a share of the training images in [0, 1), got {self.validation}")
        for name in ("class_names", "image_column", "label_column", "split_column"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty: leave it out, or name one")

    def columns(self) -> dict[str, str]:
        """The columns that the user named: "image", "label", "split" -> name."""
        named = {"image": self.image_column, "label": self.label_column, "split": self.split_column}
        return {kind: name for kind, name in named.items() if name is not None}
