"""A grid: data sets × variants × options × shots × seeds, from YAML or flags, and the runs that it means.

    data: [caltech101, PHOTOS]        # what `fastlora train` takes as DATA
    shots: [1, 2, 4, 8, 16]
    seeds: [1, 2, 3]
    model: mini                       # any option of `fastlora train`: one value,
    dropout: [0, 0.25]                # a list: one run each,
    iterations: {1: 40, 4: 80}        # or a mapping: one value for each number of shots
    variants:                         # sets of options by name, each a row of the tables
      LoRA: {method: lora, targets: "q,k,v,o"}
      linear probe: {method: linear-probe}

Everything is read and checked before anything runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..recipe import Recipe
from ..runfolder import identity
from .options import OPTIONS, SENTENCES, closest, is_tuple, recipe_of, value_of

__all__ = ["PRESETS", "Grid", "Run", "from_flags", "listed", "parse", "preset", "read"]

FOLDER = Path(__file__).parent / "presets"
PRESETS = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
KEYS = ("title", "data", "root", "shots", "seeds", "variants")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a grid: what to do, and how tables call it.

    Args:
        data: what `datasets.load` takes.
        recipe: everything that decides the outcome.
        variant: the name of its set of options.
        axes: the options that differ within its variant, as text.
    """

    data: str
    recipe: Recipe
    variant: str
    axes: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder: readable, and another one whenever the outcome may be another.

        Options at their default are left out of the hash: an option that a later version adds does not make a run new.
        """
        values, defaults = _flat(identity(self.recipe, self.data)), _flat(identity(Recipe(), ""))
        said = json.dumps({key: value for key, value in values.items() if value != defaults.get(key)}, sort_keys=True)
        digest = hashlib.blake2b(said.encode(), digest_size=4).hexdigest()
        data = "".join(c if c.isalnum() or c in "-_" else "_" for c in self.data.rstrip("/").rpartition("/")[2])
        return f"{data}-{self.recipe.method}-{self.recipe.shots}shots-seed{self.recipe.seed}-{digest}"

    @property
    def label(self) -> str:
        """The variant and the options that differ within it."""
        said = ", ".join(f"{name} {value}" for name, value in self.axes)
        return f"{self.variant}: {said}" if self.variant and said else self.variant or said or self.recipe.method


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of a grid in the order in which they are done, where their data are, and a title.

    A run that stands in several variants is in `runs` once for each, under one name, and is carried out once.
    """

    runs: tuple[Run, ...]
    roots: tuple[Path, ...] = (Path("data"),)
    title: str = "Few-shot runs"


def read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, no mapping, a key that stands there twice, or no YAML, with the line.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise UserError(f"grid {path} does not exist: give a YAML file, or --preset {' | '.join(PRESETS)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"grid {path} cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"grid {path}{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"grid {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"grid {path} holds no mapping: it needs lines such as data: [caltech101] and shots: [1, 4, 16]")
    return values


def preset(name: str) -> dict[str, Any]:
    """The mapping of a grid that comes with the package.

    Raises:
        UserError: there is none of this name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: {closest(name, PRESETS)}")
    return read(FOLDER / f"{name}.yaml")


def parse(values: dict[str, Any], where: str = "grid") -> Grid:
    """The grid that `values` (as `read` gives them) means.

    Raises:
        UserError: an unknown key with the closest known one, or a bad value; the message begins with `where`.
    """
    try:
        return _parse(values)
    except (UserError, ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error


def _parse(values: dict[str, Any]) -> Grid:
    values = {_key(name): value for name, value in values.items()}
    for name in values:
        if name not in KEYS and name not in OPTIONS:
            raise UserError(f"unknown option {name!r}: {closest(name, (*KEYS, *OPTIONS))}")
    data = [str(name) for name in _list(values.get("data"))]
    if not data:
        raise UserError("data is missing: which data sets, for example data: [caltech101]")
    shots = _numbers("shots", values.get("shots", Recipe.shots), 1)
    seeds = _numbers("seeds", values.get("seeds", [1, 2, 3]), 0)
    variants = values.get("variants", {"": {}})
    if not isinstance(variants, dict) or not variants:
        raise UserError("variants must be named sets of options, for example variants: {LoRA: {method: lora}}")
    common = {name: value for name, value in values.items() if name in OPTIONS}
    runs: dict[tuple[str, str], Run] = {}
    for one in data:
        for variant, options in variants.items():
            for run in _variant(one, str(variant), common, options, shots, seeds):
                runs.setdefault((run.variant, run.name), run)  # a probe is the same whatever the rank
    roots = tuple(Path(str(root)) for root in _list(values.get("root", "data")))
    return Grid(tuple(runs.values()), roots, str(values.get("title", Grid.title)))


def _variant(
    data: str, variant: str, common: dict[str, Any], options: Any, shots: list[int], seeds: list[int]
) -> Iterator[Run]:
    if not isinstance(options, dict):
        raise UserError(f"variant {variant!r} must be a mapping of options, got {options!r}")
    own = {_key(name): value for name, value in options.items()}
    for name in own:
        if name not in OPTIONS:
            raise UserError(f"variant {variant!r}: unknown option {name!r}: {closest(name, OPTIONS)}")
    merged = common | own
    axes = {name: [_by_shots(name, v, shots) for v in _list(value)] for name, value in merged.items()}
    if empty := [name for name, choices in axes.items() if not choices]:
        raise UserError(f"{empty[0]} has no value: an empty list means no run")
    for chosen in itertools.product(*axes.values()):
        picked = dict(zip(axes, chosen, strict=True))
        differing = tuple((name, _text(by[shots[0]])) for name, by in picked.items() if len(axes[name]) > 1)
        for count in shots:
            for seed in seeds:
                recipe = recipe_of({name: by[count] for name, by in picked.items()}, count, seed)
                if recipe.method == "zero-shot":  # the same for all shots and seeds
                    recipe = dataclasses.replace(recipe, shots=min(shots), seed=seeds[0])
                yield Run(data, recipe, variant, differing)


def _key(name: Any) -> str:
    key = str(name).replace("-", "_")
    return "seeds" if key == "seed" else key


def _list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _by_shots(name: str, value: Any, shots: list[int]) -> dict[int, Any]:
    """One value of an option for each number of shots."""
    if not isinstance(value, dict) or name == "rank_pattern":
        return dict.fromkeys(shots, value_of(name, value))
    if missing := [count for count in shots if count not in value]:
        raise UserError(f"{name} has no value for {missing[0]} shots: it gives {', '.join(map(str, value))}")
    return {count: value_of(name, value[count]) for count in shots}


def _numbers(name: str, given: Any, least: int) -> list[int]:
    numbers = _list(given)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise UserError(f"{name} must be whole numbers of at least {least}, got {number!r}")
    if not numbers or (twice := [n for n, times in Counter(numbers).items() if times > 1]):
        raise UserError(f"{name} is empty" if not numbers else f"{name} names {twice[0]} twice")
    return numbers


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def listed(name: str, text: str) -> list[Any]:
    """`--shots 1,2,4` as a list; numbers where the grid wants them."""
    # commas in braces are part of a pattern: shards-{a,b}.tar
    parts = [part.strip() for part in re.split(r",(?![^{}]*\})", text) if part.strip()]
    if name == "data":
        return parts
    if bad := [part for part in parts if not part.isdecimal()]:
        raise UserError(f"--{name} takes whole numbers with commas, got {bad[0]!r}")
    return [int(part) for part in parts]


def from_flags(arguments: list[str]) -> tuple[Path | None, dict[str, Any]]:
    """`GRID --rank 2,4 --targets q,k,v --targets q` as a file and grid values; what is given twice, or with commas, is a list.

    Raises:
        UserError: an option that there is not, or one without a value, or a second file.
    """
    grid: Path | None = None
    values: dict[str, list[str]] = {}
    left = list(arguments)
    while left:
        flag = left.pop(0)
        if not flag.startswith("--"):
            if grid is not None:
                raise UserError(f"unexpected argument {flag!r}: one grid file, then --OPTION VALUE; several values with commas")
            grid = Path(flag)
            continue
        flag, equals, value = flag.partition("=")
        name = _key(flag[2:])
        if name not in OPTIONS:
            raise UserError(f"unknown option {flag}: {closest(name, ('data', 'root', 'shots', 'seeds', *OPTIONS), '--')}")
        if not equals:
            if not left or left[0].startswith("--"):
                raise UserError(f"{flag} needs a value")
            value = left.pop(0)
        values.setdefault(name, []).extend([value] if is_tuple(name) or name in SENTENCES else value.split(","))
    return grid, {name: parts[0] if len(parts) == 1 else parts for name, parts in values.items()}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which the plain loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
