"""Files written whole or not at all, and files read without running anything that is in them."""

from __future__ import annotations

import contextlib
import glob
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..beside import whole

__all__ = [
    "FLOATS", "atomic", "atomic_folder", "leftovers", "one_line", "open_safetensors", "plain", "read_pickle", "readable",
    "write_safetensors",
]  # fmt: skip

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that becomes `path` when the block ends well, whole or not at all.

    Raises:
        FileExistsError: there is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there and not empty: give a folder of its own to a checkpoint")
    # a name that nobody has, so that nothing of somebody's is removed; the folder inside has the usual permissions
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as outer:
        made = Path(outer, "made")
        made.mkdir()
        yield made
        os.replace(made, path)


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files of `atomic(path)` that are there: of somebody who is writing, or who was killed at it."""
    begun = path.parent.glob(f".{glob.escape(path.name)}.*.tmp")
    return [file for file in begun if file.name.removeprefix(f".{path.name}.").removesuffix(".tmp").isdecimal()]


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Tensors by name, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    held: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in tensors.items():
        here = whole(tensor).cpu().contiguous()
        # the format takes no tensors that share memory, as tied ones do and the views of a packed one
        if here.untyped_storage().nbytes() != here.nbytes or here.data_ptr() in memory:
            here = here.clone()
        memory.add(here.data_ptr())
        held[name] = here
    try:
        with atomic(path) as temporary:
            save_file(held, temporary, metadata=metadata)
    except SafetensorError as error:  # safetensors wraps a full disk or a missing folder
        raise OSError(f"cannot write {path}: {error}") from None


@contextlib.contextmanager
def readable(path: Path, fault: str) -> Iterator[None]:
    """Within: what Python raises on values that are not what they should be becomes one ValueError: "PATH is FAULT: …"."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, re.error) as error:
        raise ValueError(f"{path} is {fault}: {error!r}") from None
    except ValueError as error:  # of json, or a value that LoRAConfig does not take
        raise error if str(path) in str(error) else ValueError(f"{path} is {fault}: {error}") from None


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Within: a ValueError's message is one line of at most 500 characters, whatever names a file made up."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        if said.isprintable() and len(said) <= 500:
            raise
        said = "".join(c if c.isprintable() else "?" for c in said)
        raise ValueError(said if len(said) <= 500 else f"{said[:400]} … {said[-90:]}") from None


def plain(path: object, name: str, value: Any) -> Tensor:
    """`value` if it is a dense tensor of floating-point numbers on the CPU.

    Raises:
        ValueError: anything else, with what it is.
    """
    if not isinstance(value, Tensor):
        found = f"a {type(value).__name__}"
    elif value.is_meta or value.layout != torch.strided or value.is_nested:
        found = "a tensor without values" if value.is_meta else f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    elif value.dtype not in FLOATS:
        found = f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    else:
        return value
    kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
    raise ValueError(f"{path} is damaged: {name} is {found}, and should be a dense one of {kinds}")


@contextlib.contextmanager
def open_safetensors(path: Path, what: str) -> Iterator[Any]:
    """safetensors' handle of a file: keys(), metadata(), get_tensor(name).

    Raises:
        ValueError: not safetensors, or cut short; `what` says what it should have been.
    """
    try:
        with safe_open(path, "pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable {what}: {error}") from None


def read_pickle(path: Path, what: str) -> Any:
    """A file of torch.save: tensors and plain containers; anything that would run code is refused, unrun.

    Raises:
        ValueError: not such a file, or one with more in it; `what` says what it should have been.
    """
    try:
        with warnings.catch_warnings():  # what torch would warn of comes as the error
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable {what}, or holds more than tensors and plain values: {reason}") from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise ValueError(f"{path} is not a readable {what}: {(str(error) or type(error).__name__).splitlines()[0]}") from None
