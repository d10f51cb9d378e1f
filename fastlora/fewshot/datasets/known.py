"""The 11 data sets of the paper: folder names, files and prompts, in CoOp's layout and in that of the paper's code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from .base import TEMPLATE, WORDNET_ID

__all__ = ["GENERATED", "KNOWN", "KnownSet", "Located", "Piece", "identify", "locate"]

COOP = "from CoOp's DATASETS.md"
# beside images that fastlora drew itself: they only have the layout of the set
GENERATED = "GENERATED.txt"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A file or folder that a set needs: where it may lie below the set's folder, first as CoOp has it, and what it is."""

    paths: tuple[str, ...]
    what: str

    def find(self, place: Path) -> Path | None:
        """Where it lies below `place`."""
        return next((place / path for path in self.paths if (place / path).exists()), None)


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """A data set of the paper.

    Args:
        title: its column in the paper's table.
        folders: names of its folder below the root: CoOp's, then others in use.
        classes: how many.
        sizes: images for training, validation and test, as published (ImageNet's as CoOp uses it).
        images: the folder that paths in the split file start from, below the set's folder.
        split: CoOp's split file; None for sets that bring their own.
        pieces: everything that must be there besides the split file.
        own_template: CoOp's prompt; the paper takes "a photo of a {}." for all.
    """

    title: str
    folders: tuple[str, ...]
    classes: int
    sizes: tuple[int, int, int]
    images: str
    split: str | None = None
    pieces: tuple[Piece, ...] = ()
    own_template: str = TEMPLATE

    def needs(self) -> tuple[Piece, ...]:
        """Every piece, the split file first."""
        split = () if self.split is None else (Piece((self.split,), f"CoOp's split file, {COOP}"),)
        return split + (self.pieces or (Piece((self.images,), "the images"),))


KNOWN = {
    "imagenet": KnownSet(
        "ImageNet", ("imagenet", "ImageNet"), 1000, (1_281_167, 0, 50_000), "images",
        pieces=(
            Piece(("classnames.txt", "LOC_synset_mapping.txt"), f"WordNet ids and class names, as n01440764 tench, {COOP}"),
            Piece(("images/train", "train"), "training images, one folder n01440764, … a class"),
            Piece(("images/val", "val"), "validation images, which are the test, one folder n01440764, … a class"),
        ),
    ),
    "caltech101": KnownSet(
        "Caltech101", ("caltech-101", "Caltech101"), 100, (4128, 1649, 2465), "101_ObjectCategories",
        "split_zhou_Caltech101.json",
    ),
    "oxford_pets": KnownSet(
        "OxfordPets", ("oxford_pets", "OxfordPets"), 37, (2944, 736, 3669), "images", "split_zhou_OxfordPets.json",
        own_template="a photo of a {}, a type of pet.",
    ),
    "stanford_cars": KnownSet(
        "StanfordCars", ("stanford_cars", "StanfordCars"), 196, (6509, 1635, 8041), "", "split_zhou_StanfordCars.json",
        pieces=(Piece(("cars_train",), "training and validation images"), Piece(("cars_test",), "test images")),
    ),
    "oxford_flowers": KnownSet(
        "Flowers102", ("oxford_flowers", "Flower102"), 102, (4093, 1633, 2463), "jpg", "split_zhou_OxfordFlowers.json",
        own_template="a photo of a {}, a type of flower.",
    ),
    "food101": KnownSet(
        "Food101", ("food-101", "Food101"), 101, (50_500, 20_200, 30_300), "images", "split_zhou_Food101.json",
        own_template="a photo of {}, a type of food.",
    ),
    "fgvc_aircraft": KnownSet(
        "FGVCAircraft", ("fgvc_aircraft", "FGVCAircraft", "fgvc-aircraft-2013b/data"), 100, (3334, 3333, 3333), "images",
        pieces=(
            Piece(("variants.txt",), "the class names, one a line, from the archive's folder data"),
            *(Piece((f"images_variant_{role}.txt",), f"image and class of each {role} image, one a line, from the same folder")
              for role in ("train", "val", "test")),
            Piece(("images",), "the images"),
        ),
        own_template="a photo of a {}, a type of aircraft.",
    ),
    "sun397": KnownSet("SUN397", ("sun397", "SUN397"), 397, (15_880, 3970, 19_850), "SUN397", "split_zhou_SUN397.json"),
    "dtd": KnownSet(
        "DTD", ("dtd", "DTD"), 47, (2820, 1128, 1692), "images", "split_zhou_DescribableTextures.json",
        own_template="{} texture.",
    ),
    "eurosat": KnownSet(
        "EuroSAT", ("eurosat", "EuroSAT"), 10, (13_500, 5400, 8100), "2750", "split_zhou_EuroSAT.json",
        own_template="a centered satellite photo of {}.",
    ),
    "ucf101": KnownSet(
        "UCF101", ("ucf101", "UCF101"), 101, (7639, 1898, 3783), "UCF-101-midframes", "split_zhou_UCF101.json",
        own_template="a photo of a person doing {}.",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Located:
    """A known set below a root: its folder (None where there is none), and what to put where, one line each."""

    name: str
    place: Path | None
    missing: tuple[str, ...]


def locate(name: str, root: Path) -> Located:
    """Where the known set `name` lies: in one of its folders below `root`, or in `root` itself; looks at its few pieces."""
    known = KNOWN[name]
    places = [root / folder for folder in known.folders if (root / folder).is_dir()]
    if identify(root) == name:
        places.append(root)
    if not places:
        pieces = "; ".join(f"{piece.paths[0]} ({piece.what})" for piece in known.needs())
        return Located(name, None, (f"make the folder {root / known.folders[0]} with {pieces}",))
    place = min(places, key=lambda p: len(_missing(known, p)))
    return Located(name, place, _missing(known, place))


def _missing(known: KnownSet, place: Path) -> tuple[str, ...]:
    return tuple(f"put {piece.what}, at {place / piece.paths[0]}" for piece in known.needs() if piece.find(place) is None)


def identify(folder: Path) -> str | None:
    """The known set whose folder this is, by its split file or by all its pieces."""
    for name, known in KNOWN.items():
        marks = known.needs()[: 1 if known.split else None]
        if all(piece.find(folder) for piece in marks) and (name != "imagenet" or _wordnet(folder)):
            return name
    return None


def _wordnet(folder: Path) -> bool:
    """Whether the first class name has a WordNet id before it; other folders hold train, val and classnames.txt too."""
    names = KNOWN["imagenet"].needs()[0].find(folder)
    if names is None or not names.is_file():
        return False
    with open(names, encoding="utf-8", errors="replace") as file:
        return bool(re.match(rf"{WORDNET_ID}\b", file.readline()))
