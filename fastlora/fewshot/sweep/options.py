"""The options of `fastlora train` as a grid names them: which there are, and values from YAML or a command line."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any

from ...config import LoRAConfig
from ..datasets import prompts
from ..errors import UserError
from ..models import MINI
from ..reading import Reading
from ..recipe import Recipe, one_or_all

__all__ = ["OPTIONS", "closest", "is_tuple", "recipe_of", "value_of"]

_RECIPE = {f.name: f for f in dataclasses.fields(Recipe) if f.name not in ("shots", "seed", "lora", "reading")}
_LORA = {f.name: f for f in dataclasses.fields(LoRAConfig) if f.name != "backend"}
_READING = {f.name: f for f in dataclasses.fields(Reading)}
_HINTS = typing.get_type_hints(Recipe) | typing.get_type_hints(LoRAConfig) | typing.get_type_hints(Reading)
# Every option but shots and seed, which are axes of every grid.
OPTIONS: tuple[str, ...] = (*_RECIPE, *_LORA, *_READING)
# Their commas and spaces are their own.
SENTENCES = ("template", "class_names", "image_column", "label_column", "split_column")
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def closest(name: str, known: Collection[str], before: str = "") -> str:
    """ "did you mean rank?", or what there is; `before` goes before a name."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"did you mean {before}{close[0]}?" if close else f"known are {', '.join(known)}"


def is_tuple(name: str) -> bool:
    """Whether one value of the option, as text, may consist of several parts: "q,k,v"."""
    return name not in SENTENCES and not all(_is_single(kind) for kind in _kinds(name))


def value_of(name: str, given: Any) -> Any:
    """`given`, as YAML or a command line has it, as a value of the option `name`; ranges are the recipe's to check.

    Raises:
        UserError: it is no such value.
    """
    kinds = _kinds(name)
    if type(None) in kinds and (given is None or (isinstance(given, str) and given.lower() == "none")):
        return None
    for kind in kinds:
        if kind is type(None) or (name in SENTENCES and isinstance(given, str) and kind is not str):
            continue
        try:
            return _read(kind, given)
        except (TypeError, ValueError):
            continue
    raise UserError(f"{name} must be {_say(kinds)}, got {given!r}")


def recipe_of(options: dict[str, Any], shots: int, seed: int) -> Recipe:
    """The recipe with these options; what does not bear on the method is left at its default.

    Raises:
        ValueError: a value outside its range.
    """
    lora = LoRAConfig(**{name: value for name, value in options.items() if name in _LORA})
    values = {name: value for name, value in options.items() if name in _RECIPE}
    if values.get("model") == MINI and values.get("pretrained", "openai") == "openai":
        values["pretrained"] = None  # it has weights of its own
    if values.get("template") is not None:
        values["template"] = one_or_all(prompts(values["template"]))
    reading = Reading(**{name: value for name, value in options.items() if name in _READING})
    recipe = Recipe(shots=shots, seed=seed, lora=lora, reading=reading, **values)
    plain: dict[str, Any] = {} if recipe.method == "lora" else {"lora": LoRAConfig()}
    if not recipe.trains:
        plain |= {"iterations": None, "lr": None, "batch_size": Recipe.batch_size}
    return dataclasses.replace(recipe, **plain)


def _kinds(name: str) -> tuple[Any, ...]:
    hint: Any = _HINTS[name]
    kinds: tuple[Any, ...] = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return tuple(sorted(kinds, key=_is_single))  # "0,1" is block numbers before it is a word


def _is_single(kind: Any) -> bool:
    return typing.get_origin(kind) is not tuple


def _read(kind: Any, given: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        parts = given.replace(",", " ").split() if isinstance(given, str) else given
        if not isinstance(parts, Iterable):
            parts = (parts,)
        parts, kinds = tuple(parts), typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            kinds = (kinds[0],) * len(parts)
        if len(kinds) != len(parts):
            raise ValueError
        return tuple(_read(k, part) for k, part in zip(kinds, parts, strict=True))
    if kind is bool:
        if isinstance(given, bool):
            return given
        return WORDS[given.lower()] if isinstance(given, str) and given.lower() in WORDS else _refuse()
    if kind is int:
        if isinstance(given, str) and given.strip().lstrip("-").isdecimal():
            return int(given)
        return given if isinstance(given, int) and not isinstance(given, bool) else _refuse()
    if kind is float:  # YAML takes 1e-3 for a word
        return _refuse() if isinstance(given, bool) else float(given)
    if kind is str:
        return given if isinstance(given, str) else _refuse()
    return given


def _refuse() -> Any:
    raise ValueError


def _say(kinds: tuple[Any, ...]) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}
    said = []
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            parts = typing.get_args(kind)
            count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
            said.append(f"{count}{'words' if parts[0] is str else 'numbers'} with commas")
        else:
            said.append(names.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(said)
