"""The compiled kernels, run instruction by instruction on a CPU by an emulator of PTX that also looks for races.

The emulator is no part of this project: FASTLORA_PTXRUN names its folder, with check.py and launcher.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import HANG

FOLDER = os.environ.get("FASTLORA_PTXRUN")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FOLDER is None, reason="FASTLORA_PTXRUN names no folder of an emulator of PTX"),
]
RACING = """
import torch
from launcher import launch
from racing import loaded_twice, shared_by_two
torch.manual_seed(0)
x, w = (torch.randn(128, 512).bfloat16() for _ in range(2))
for kernel in (shared_by_two, loaded_twice):
    y, s = (torch.zeros(n, 128, dtype=torch.bfloat16) for n in (128, 16))
    arguments = {"x_ptr": x, "w_ptr": w, "a_ptr": x, "y_ptr": y, "s_ptr": s, "K": 512}
    ran = launch(kernel, 1, arguments, warps=8, stages=3, arch=90)
    right = torch.allclose(y.float(), x.float() @ w.float().T, rtol=2e-2, atol=0.5)
    print(kernel.__name__, right, sorted({finding.kind for finding in ran.findings}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python beside the emulator and these tests, with Triton's compiler instead of its interpreter."""
    assert FOLDER is not None
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((FOLDER, str(Path(__file__).parent))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANG)


@pytest.mark.parametrize("needs", ["all", "adapters", "input"])
@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_default_recipes_kernels_are_right_and_free_of_races(arch: str, needs: str) -> None:
    """Half precision at a padded rank of 16, dropout on and off, copies early and late; check.py --all runs every row."""
    assert FOLDER is not None
    done = run(str(Path(FOLDER, "check.py")), "--arch", arch, "--needs", needs)
    assert done.returncode == 0 and "0 launches or results wrong or with findings" in done.stdout, done.stdout + done.stderr


def test_a_race_is_seen_as_wrong_numbers() -> None:
    """What the emulator says is worth something: it sees the race that the rule of test_races.py sees."""
    done = run("-c", RACING)
    shared, twice = done.stdout.splitlines()
    assert shared == "shared_by_two False ['product']" and twice == "loaded_twice True []", done.stdout + done.stderr
