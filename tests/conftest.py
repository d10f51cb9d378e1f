"""What must hold before any test module is imported."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.testing import repair_interpreter

# With the repository's root on sys.path, the folder kernels/ would hide PyPI's `kernels`, which transformers imports.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
# benchmarks/ is a folder of scripts, not a package; behind tests/, where two files have names of files there.
sys.path.append(str(ROOT / "benchmarks"))

# Triton reads this when it is first imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    repair_interpreter()


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """The CPU kernels of one width, compiled for machines that have no such vectors."""
    from fastlora import cpu

    @functools.cache
    def library(width: int) -> Any:
        made = tmp_path_factory.mktemp("portable") / f"{width}.so"
        compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
        options = [f"-DPORTABLE={width}", "-O1", "-shared", "-fPIC", "-pthread", "-o", str(made)]
        try:
            subprocess.run([*compiler, *options, *map(str, (ROOT / "kernels").glob("*.c")), "-lm"], check=True)
        except FileNotFoundError:
            pytest.skip(f"this machine has neither vectors of {width} floats nor a C compiler")
        return cpu._load(str(made))

    return library


@pytest.fixture(params=[4, 8, 16], ids=lambda n: f"{n}-lanes")
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, portable: Callable[[int], Any]) -> int:
    """The CPU kernels with vectors of so many floats, whatever this machine has."""
    from fastlora import cpu

    if cpu.lanes(request.param) != request.param:
        library = portable(request.param)
        monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setattr(cpu, "lanes", lambda: request.param)
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIP on the disk: its name for --model."""
    from pictures import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of eight pictures."""
    from pictures import make_folder

    return make_folder(tmp_path_factory.mktemp("data") / "pictures", ("red", "green", "blue"), images=8)


@pytest.fixture
def fastlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process: arguments -> pictures.Ran."""
    from fastlora import cli
    from pictures import Ran

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr("sys.argv", ["fastlora", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return Ran(left.value.code, *capsys.readouterr())

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch.cuda.is_available() is False"))
