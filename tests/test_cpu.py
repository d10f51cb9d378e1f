"""The compiled CPU kernels: found, loaded, and run on threads, whoever gives these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora import cpu, thin
from fastlora.encoders import short_attention
from fastlora.encoders.packing import Sequences
from waiting import HANG

compiled = pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")


def all_kernels() -> list[torch.Tensor]:
    torch.manual_seed(0)
    x, a, dx = torch.randn(700, 64), torch.randn(2, 2, 64), torch.zeros(700, 64)
    da = thin.shrink_backward(torch.randn(700, 4), x, a, dx, torch.tensor(1), None, 0.25, 0, [0, 1])
    qkv = torch.randn(700, 192, requires_grad=True)
    y = short_attention.attend(qkv, 2, Sequences(((70, 10),), causal=True))
    return [thin.shrink(x, a, None, None, 0.0, 0, [0, 1]), dx, da, y.detach(), *torch.autograd.grad(y.sum(), qkv)]


@compiled
@pytest.mark.parametrize("threads", [1, 2, 5, 300])
@pytest.mark.parametrize("pool", ["torch's", "its own"])
def test_threads_of_torch_and_of_its_own_compute_the_same(pool: str, threads: int) -> None:
    library: Any = cpu._library()
    before, expected = torch.get_num_threads(), all_kernels()
    try:
        if pool == "its own":
            library.fastlora_parallel(None)
        torch.set_num_threads(threads)
        for got, want in zip(all_kernels(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    finally:
        library.fastlora_parallel(cpu._torchs_openmp())
        torch.set_num_threads(before)


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere torch runs on another OpenMP")
def test_torchs_own_pool_is_found() -> None:
    """Two pools on the same cores wait for work in busy loops, against each other: half the speed."""
    assert cpu._torchs_openmp() is not None


@compiled
def test_another_thread_may_call() -> None:
    """Autograd and loaders run in threads of others."""
    code = (
        "import threading, torch; from test_cpu import all_kernels\n"
        "first, other = all_kernels(), []\n"
        "thread = threading.Thread(target=lambda: other.extend(all_kernels()))\n"
        "thread.start(); thread.join()\n"
        "assert all(torch.allclose(a, b) for a, b in zip(first, other, strict=True))\n"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, cwd=here)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_there_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert not cpu.available()
    cpu.lanes.cache_clear()
    with pytest.raises(RuntimeError, match="install a C compiler"):
        cpu.lanes()


@compiled
def test_lanes_are_at_most_what_is_asked_for() -> None:
    assert cpu.lanes(4) == 4 and cpu.lanes(8) in (4, 8) and cpu.lanes() in (4, 8, 16)


@compiled
def test_lanes_are_at_most_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = cpu.lanes(16)
    for asked, expected in {"4": 4, "8": min(8, widest), "16": widest}.items():
        monkeypatch.setenv("FASTLORA_LANES", asked)
        assert cpu.lanes.__wrapped__() == expected
    monkeypatch.setenv("FASTLORA_LANES", "32")
    with pytest.raises(ValueError, match="FASTLORA_LANES must be 4, 8 or 16, got '32'"):
        cpu.lanes.__wrapped__()


@compiled
def test_no_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        @staticmethod
        def fastlora_thin(*_: object) -> int:
            return 1

    monkeypatch.setattr(cpu, "lanes", lambda: 4)
    monkeypatch.setattr(cpu, "_library", lambda: Full)
    with pytest.raises(MemoryError, match="no memory"):
        thin.shrink(torch.randn(4, 64), torch.randn(2, 3, 64), None, None, 0.0, 0, [0, 1])
