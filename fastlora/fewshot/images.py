"""Images in memory: decoded once, in parallel, kept as uint8.

Training images keep their own size (longer ones are shrunk once), because crops are drawn from them at every step; test images
are made square at once, as the model was trained to see them. All become upright RGB, transparency is laid on white.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor

from ..progress import bar
from .datasets import Item, Lazy

__all__ = [
    "IMAGES", "Decoded", "EvalImages", "Framing", "Unreadable", "available_memory", "decode_training", "framed", "gib",
    "in_threads", "open_rgb", "thumbnail", "training_image",
]  # fmt: skip

BICUBIC = Image.Resampling.BICUBIC
RESAMPLING = {"bicubic": BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# An image this many times longer than wide is cut to that ratio first: what is cut never reaches the centre crop.
LONGEST_RATIO = 8
TINY = 8
# Test images are kept if they take at most this share of the free memory, otherwise decoded again for each evaluation.
KEEP_SHARE = 0.25
# Training images are kept up to this share of the free memory: crops and activations need some as well.
TRAINING_SHARE = 0.7
# Where training images are: in memory, decoded from the disk at each step, or as memory allows.
IMAGES = ("auto", "memory", "stream")
T = TypeVar("T")
R = TypeVar("R")


class Unreadable(Exception):
    """An image file that cannot be decoded; the message is the reason."""


@dataclasses.dataclass
class Decoded:
    """What decoding gave, by name: uint8 images (3, h, w), why a file is broken, what was converted, heights and widths.

    Images that do not fit into memory have a size and no pixels: they are decoded anew where they are needed.
    """

    images: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)
    remarks: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Memory that the images take."""
        return sum(image.nbytes for image in self.images.values())

    def of(self, names: Collection[str]) -> Decoded:
        """The part that is about `names`."""

        def part(whole: dict[str, T]) -> dict[str, T]:
            return {name: whole[name] for name in names if name in whole}

        return Decoded(part(self.images), part(self.broken), part(self.remarks), part(self.sizes))

    def notes(self) -> list[str]:
        """One line for each kind of thing that happened."""
        counts = Counter(what for done in self.remarks.values() for what in done)
        lines = [f"images {what}: {count}" for what, count in sorted(counts.items())]
        if self.broken:
            name, reason = next(iter(self.broken.items()))
            lines.append(f"images that cannot be read, left out: {len(self.broken)}, the first is {name} ({reason})")
        return lines


def open_rgb(item: Item) -> tuple[Image.Image, set[str]]:
    """The image as upright RGB, and what had to be done to it.

    Raises:
        Unreadable: the file is missing, damaged, or not an image.
    """
    if isinstance(item.source, np.ndarray):
        return Image.fromarray(item.source), set()
    done = set()
    try:
        with _opened(item.source) as file:
            file.load()
            image: Image.Image = file.copy() if file.format == "GIF" else file
            upright = ImageOps.exif_transpose(image)
            if upright.size != image.size:
                done.add("turned upright as their EXIF data say")
            image = upright
            if image.mode == "LA" or image.mode.endswith(("A", "a")) or "transparency" in image.info:
                image = image.convert("RGBA")
                if image.getchannel("A").getextrema() != (255, 255):
                    done.add("with transparency, laid on white")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode.startswith(("I", "F")):
                image = _eight_bit(image)
                done.add("of more than 8 bits, rescaled to 8")
            if image.mode in ("L", "1", "CMYK"):
                done.add({"CMYK": "in CMYK, converted to RGB"}.get(image.mode, "in grey, converted to RGB"))
            image = image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise nearly every type on damaged files
        raise Unreadable(str(error) or type(error).__name__) from error
    if min(image.size) < TINY:
        done.add(f"smaller than {TINY} pixels, kept")
    return image, done


def _opened(source: Path | Lazy) -> Image.Image:
    """An image whose pixels need not be decoded yet."""
    if isinstance(source, Path):
        return Image.open(source)
    found = source.read()
    return Image.open(io.BytesIO(found)) if isinstance(found, bytes) else found


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float images to grey: convert() would clip them at 255."""
    pixels = np.asarray(image, dtype=np.float32)
    top = 65535.0 if pixels.max(initial=0) > 255 else 255.0
    top = 1.0 if image.mode.startswith("F") and pixels.max(initial=0) <= 1 else top
    return Image.fromarray(np.clip(pixels * (255 / top), 0, 255).round().astype(np.uint8))


def _cut(image: Image.Image) -> Image.Image:
    """The middle of an image that is more than LONGEST_RATIO times longer than wide."""
    w, h = image.size
    longest = LONGEST_RATIO * min(w, h)
    if max(w, h) <= longest:
        return image
    left, top = (max(0, side - longest) // 2 for side in (w, h))
    return image.crop((left, top, min(w, left + longest), min(h, top + longest)))


@dataclasses.dataclass(frozen=True)
class Framing:
    """How a model wants a test image made square, in open_clip's words.

    Args:
        size: its side in pixels.
        resize_mode: "shortest" (resize the shorter side, cut out the centre), "squash" (resize both sides, whatever the ratio)
            or "longest" (resize the longer side, pad the other).
        interpolation: "bicubic" or "bilinear", antialiased.
        fill_color: grey level of the padding, 0 to 255.
    """

    size: int
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    fill_color: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("resize_mode", self.resize_mode, ("shortest", "squash", "longest")),
            ("interpolation", self.interpolation, tuple(RESAMPLING)),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(known)}")


def framed(image: Image.Image, framing: Framing) -> Tensor:
    """Make an RGB image square: uint8 (3, size, size), the pixels that open_clip's own transform gives."""
    size, resample = framing.size, RESAMPLING[framing.interpolation]
    if framing.resize_mode == "squash":
        return to_tensor(image.resize((size, size), resample))
    if framing.resize_mode == "longest":
        return to_tensor(_padded(image, framing))
    image = _cut(image)
    w, h = image.size
    short = min(w, h)
    if (w, h) != (size, size):
        w, h = (size if side == short else int(size * side / short) for side in (w, h))
        image = image.resize((w, h), resample)
    left, top = round((w - size) / 2), round((h - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))


def _padded(image: Image.Image, framing: Framing) -> Image.Image:
    longest, size = max(image.size), framing.size
    w, h = (max(1, round(side * size / longest)) for side in image.size)
    canvas = Image.new("RGB", (size, size), (framing.fill_color,) * 3)
    canvas.paste(image.resize((w, h), RESAMPLING[framing.interpolation]), ((size - w) // 2, (size - h) // 2))
    return canvas


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image -> uint8 (3, h, w), contiguous."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def training_image(item: Item, max_side: int) -> tuple[Tensor, set[str]]:
    """uint8 (3, h, w), shrunk if its shorter side is above `max_side`, and what was done to it.

    Raises:
        Unreadable: the file is missing, damaged, or not an image.
    """
    image, done = open_rgb(item)
    if max(image.size) > LONGEST_RATIO * min(image.size):
        done.add(f"more than {LONGEST_RATIO} times longer than wide, cut to their middle")
        image = _cut(image)
    short = min(image.size)
    if short > max_side:
        w, h = (max(1, round(side * max_side / short)) for side in image.size)
        image = image.resize((w, h), BICUBIC)
        done.add(f"shrunk to {max_side} pixels on the shorter side")
    return to_tensor(image), done


def decode_training(items: Sequence[Item], max_side: int, into: Decoded, console: Console, where: str = "auto") -> None:
    """Decode `items` that `into` does not hold yet, in parallel, and say first how much memory they will take.

    Args:
        where: "memory" keeps the pixels; "stream" only finds out sizes and broken files; "auto" keeps what fits.

    Raises:
        MemoryError: pixels that are to be kept do not fit.
    """
    known = into.images if where == "memory" else into.sizes
    todo = [item for item in items if item.name not in known and item.name not in into.broken]
    if not todo:
        return
    expected = sum(in_threads(todo, lambda item: _pixels(item, max_side), None)) * 3
    free = available_memory()
    keep = where == "memory" or (where == "auto" and expected <= TRAINING_SHARE * free)
    verb = "keeping" if keep else "not keeping"
    console.print(f"{verb} {len(todo)} training images as uint8: {gib(expected)} of {gib(free)} free memory")
    if keep and expected > free:
        raise MemoryError(
            f"the training images take {gib(expected)}, but {gib(free)} of memory is free:"
            " lower --max-side, or use --images stream"
        )

    def one(item: Item) -> tuple[Tensor | None, tuple[int, int], set[str]] | str:
        try:
            pixels, done = training_image(item, max_side)
        except Unreadable as error:
            return str(error)
        return pixels if keep else None, (pixels.shape[1], pixels.shape[2]), done

    with bar(console) as progress:
        task = progress.add_task("decoding training images", total=len(todo))
        for item, result in zip(todo, in_threads(todo, one, lambda: progress.advance(task)), strict=True):
            if isinstance(result, str):
                into.broken[item.name] = result
                continue
            pixels, into.sizes[item.name], into.remarks[item.name] = result
            if pixels is not None:
                into.images[item.name] = pixels


def _pixels(item: Item, max_side: int) -> int:
    """Pixels that `item` will take, from its header alone; 0 for a file without one."""
    if isinstance(item.source, np.ndarray):
        w, h = item.source.shape[1], item.source.shape[0]
    else:
        try:
            with _opened(item.source) as file:
                w, h = file.size
        except Exception:  # told later, when it is decoded
            return 0
    short, long = min(w, h), min(max(w, h), LONGEST_RATIO * min(w, h))
    shrink = min(1.0, max_side / short)
    return round(short * shrink * long * shrink)


class EvalImages:
    """Test images at the model's size, in batches: kept as uint8 where memory allows, else decoded for each evaluation.

    After the first pass `items` holds those that can be read, in order, and `decoded` what was left out or converted.
    """

    def __init__(self, items: Sequence[Item], framing: Framing, console: Console) -> None:
        self.items = list(items)
        self.framing = framing
        self.decoded = Decoded()
        self._console = console
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._expected = len(self.items) * 3 * framing.size**2
        self._keep = self._expected <= KEEP_SHARE * available_memory()

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(uint8 images (n, 3, size, size), int64 labels (n,)), n at most `batch_size`, always in the same order."""
        if self._kept is None:
            first = self._kept_now(batch_size)
            if self._keep:
                self._kept = list(first)
            else:
                yield from first
                return
        yield from self._kept

    def first_broken(self) -> str:
        """Name and reason of the first image that could not be read."""
        return next((f"{name} ({reason})" for name, reason in self.decoded.broken.items()), "none")

    def _kept_now(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        where = "keeping" if self._keep else "not keeping"
        self._console.print(f"{where} {len(self.items)} test images as uint8: {gib(self._expected)}")
        good: list[Item] = []
        decoded = Decoded()
        with bar(self._console) as progress:
            task = progress.add_task("decoding test images", total=len(self.items))
            for start in range(0, len(self.items), batch_size):
                chunk = self.items[start : start + batch_size]
                pixels, labels = [], []
                for item, result in zip(chunk, in_threads(chunk, self._one, lambda: progress.advance(task)), strict=True):
                    if isinstance(result, str):
                        decoded.broken[item.name] = result
                        continue
                    pixels.append(result[0])
                    labels.append(item.label)
                    good.append(item)
                    decoded.remarks[item.name] = result[1]
                if pixels:
                    yield torch.stack(pixels), torch.tensor(labels)
        self.items, self.decoded = good, Decoded({}, self.decoded.broken | decoded.broken, decoded.remarks)

    def _one(self, item: Item) -> tuple[Tensor, set[str]] | str:
        try:
            image, done = open_rgb(item)
        except Unreadable as error:
            return str(error)
        return framed(image, self.framing), done


def thumbnail(item: Item, size: int) -> Image.Image:
    """The centre of a test image, as an RGB image of size × size pixels."""
    return Image.fromarray(framed(open_rgb(item)[0], Framing(size)).permute(1, 2, 0).numpy())


def in_threads(items: Sequence[T], function: Callable[[T], R], tick: Callable[[], None] | None) -> list[R]:
    """Return function of each item, in order, on as many threads as there are cores (Pillow lets go of Python's lock)."""
    results = []
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for result in pool.map(function, items):
            results.append(result)
            if tick:
                tick()
    return results


def available_memory() -> int:
    """Bytes of memory that can be taken without swapping, as far as the system tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 34


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
