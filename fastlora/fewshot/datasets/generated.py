"""Small generated images in the layout of each of the 11 known sets, to try readers, training and sweeps without the real ones.

A class is a shape in a colour; an image is that on noise, at a random place and size. The same arguments give
the same bytes. A file GENERATED.txt lies beside them, and what reads such a set says that its images are generated.
"""

from __future__ import annotations

import colorsys
import dataclasses
import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ...checkpoint.files import atomic_folder
from ..errors import UserError
from .known import GENERATED, KNOWN, KnownSet

__all__ = ["Mini", "write"]

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
NOISE = 34.0


@dataclasses.dataclass(frozen=True)
class Mini:
    """How much to draw: classes a set, images a class for training, validation and test, pixels a side.

    Raises:
        ValueError: fewer than two classes or more than there are shapes and colours, or no image of a role.
    """

    classes: int = 4
    train: int = 16
    val: int = 4
    test: int = 8
    side: int = 48

    def __post_init__(self) -> None:
        most = len(COLOURS) * len(SHAPES)
        if not 2 <= self.classes <= most:
            raise ValueError(f"classes must be from 2 to {most}, got {self.classes}")
        if min(self.train, self.val, self.test) < 1 or self.side < 8:
            raise ValueError(f"a class needs an image of each role, of at least 8 pixels, got {self}")


def write(root: Path, names: Iterable[str] = tuple(KNOWN), size: Mini | None = None) -> None:
    """Draw the known sets `names` below `root`, in CoOp's folders; a generated set that is there already is kept.

    Raises:
        UserError: a folder that holds something else.
    """
    size = size or Mini()
    for name in names:
        place = root / KNOWN[name].folders[0]
        stamp = f"Images drawn by fastlora in the layout of {name}, not the real ones.\n{dataclasses.asdict(size)}\n"
        marker = place / GENERATED
        if marker.is_file() and marker.read_text(encoding="utf-8") == stamp:
            continue
        if place.exists():
            what = "other generated images" if marker.is_file() else "something else"
            raise UserError(f"{place} holds {what}: choose another root, or remove it")
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(place) as made:  # what is stopped half-way is not taken for whole
            _write_set(name, KNOWN[name], made, size)
            (made / GENERATED).write_text(stamp, encoding="utf-8")


def _write_set(name: str, known: KnownSet, place: Path, size: Mini) -> None:
    seed = zlib.crc32(name.encode())
    order = np.random.default_rng(seed).permutation(len(COLOURS) * len(SHAPES))[: size.classes]
    looks = [(COLOURS[i // len(SHAPES)], SHAPES[i % len(SHAPES)]) for i in order]
    classes = [f"{colour} {shape}" for colour, shape in looks]
    rows: dict[str, list[tuple[str, int, str]]] = {"train": [], "val": [], "test": []}
    for label, look in enumerate(looks):
        first = 0
        for role, count in (("train", size.train), ("val", size.val), ("test", size.test)):
            for number in range(first, first + count):
                path = _path(name, role, label, classes[label], number)
                file = place / known.images / path
                file.parent.mkdir(parents=True, exist_ok=True)
                _draw(*look, size.side, np.random.default_rng((seed, label, number))).save(file, quality=90)
                rows[role].append((path, label, classes[label]))
            first += count
    if known.split is not None:
        (place / known.split).write_text(json.dumps(rows), encoding="utf-8")
    elif name == "imagenet":
        lines = [f"{_wnid(label)} {words}" for label, words in enumerate(classes)]
        (place / "classnames.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        (place / "variants.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
        for role, listed in rows.items():
            lines = [f"{Path(path).stem} {words}" for path, _, words in listed]
            (place / f"images_variant_{role}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _path(name: str, role: str, label: int, words: str, number: int) -> str:
    """Where an image lies below the image folder, as the real set has it."""
    if name == "imagenet":  # it has no validation shots: its val is the test
        return f"{'val' if role == 'test' else 'train'}/{_wnid(label)}/{number:04d}.jpg"
    if name == "stanford_cars":
        return f"cars_{'test' if role == 'test' else 'train'}/{label:02d}{number:03d}.jpg"
    if name in ("oxford_pets", "oxford_flowers", "fgvc_aircraft"):
        return f"{label:02d}{number:04d}.jpg"
    return f"{words.replace(' ', '_')}/{number:04d}.jpg"


def _wnid(label: int) -> str:
    return f"n{10_000_000 + label}"


def _draw(colour: str, shape: str, side: int, rng: np.random.Generator) -> Image.Image:
    """One picture of a coloured shape on noise."""
    hue = COLOURS.index(colour) / len(COLOURS)
    rgb = np.array(colorsys.hsv_to_rgb((hue + rng.normal(0, 0.02)) % 1, rng.uniform(0.5, 0.9), rng.uniform(0.6, 1)))
    radius = side * rng.uniform(0.22, 0.4)
    x, y = rng.uniform(radius, side - radius, 2)
    mask = Image.new("L", (side, side))
    _shape(ImageDraw.Draw(mask), shape, x, y, radius)
    ground = rng.uniform(40, 215, 3)
    noise = rng.normal(0, NOISE, (side, side, 3))
    inside = np.asarray(mask, np.float32)[..., None] / 255
    pixels = ground * (1 - inside) + 255 * rgb * inside + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "square":
        draw.rectangle(box, fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=max(2, round(r / 3)))
    elif shape == "cross":
        draw.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        draw.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=255)
    else:
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
