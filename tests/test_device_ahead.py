"""What benchmarks/device.py compiles ahead is what the launcher finds, and what the minutes are planned with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench_support import BENCHMARKS, without_interpreter
from waiting import HANG

pytest.importorskip("triton", reason="Triton is for Linux only")

# Compiles ahead what a call needs, in a pool; then makes the call's launches from real tensors, as a GPU's launcher would.
AHEAD = """
import json, sys
sys.path.insert(0, sys.argv[1])

def main():
    import torch
    from fastlora.config import OpSpec
    from fastlora.kernels import compile, lora_linear, tiles
    from fastlora.kernels.launch import recording
    from gpu.ahead import Ahead, needed, standing_in
    from gpu.items import Item
    from gpu.run import compilations

    call = tiles.Call(90, "half", 16, True)
    config = compile.Config(call, torch.bfloat16, (True,) * 3, 256, 640, 2)
    item = Item("b", "one", 1.0, lambda run: [], needs=(needed(config),))
    ahead = Ahead([item], 90, 2)
    problems, counts = ahead.wait(item, 1e9), ahead.counts()
    ahead.stop()

    a, b = torch.randn(3, 2, 256), torch.randn(768, 2)
    x, w, dy = (torch.randn(*shape).bfloat16() for shape in ((640, 256), (768, 256), (640, 768)))
    spec, seed = OpSpec(1.3, 0.25, 7, (0, 1, 2), (True,) * 3), torch.zeros((), dtype=torch.int64)
    plan = tiles.choose(call)
    with tiles.assuming(132), recording() as launches:
        y, s = lora_linear.forward(x, w, torch.randn(768).bfloat16(), a, b, spec, seed, None, plan=plan)
        lora_linear.backward(dy, x, s, w, a, b, spec, seed, None, (True, True, True), plan=plan)
    with standing_in(90), compilations() as late:
        for launch in launches:
            launch.compile()
    print(json.dumps({"problems": problems, "counts": counts, "launches": len(launches), "late": late}))

if __name__ == "__main__":
    main()
"""


def compiled(code: str, cache: Path, folder: Path) -> dict[str, object]:
    script = folder / "ahead.py"
    script.write_text(code)
    environment = without_interpreter() | {"TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, str(script), str(BENCHMARKS)], capture_output=True, text=True, env=environment, timeout=HANG
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_launcher_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    found = compiled(AHEAD, tmp_path / "cache", tmp_path)
    assert found["problems"] == [] and found["late"] == []
    # pack is started twice
    assert found["launches"] == 7 and found["counts"] == {"kernels": 6, "done": 6, "wrong": 0}


def test_what_the_pool_cannot_compile_is_said(tmp_path: Path) -> None:
    """Here launches that cannot even be recorded."""
    code = AHEAD.replace("needs=(needed(config),)", "needs=(needed(config, 'no plan'),)")
    code = (
        code[: code.index("    a, b =")]
        + "    print(json.dumps({'problems': problems}))\n"
        + AHEAD[AHEAD.index("\nif __name__") :]
    )
    found = compiled(code, tmp_path, tmp_path)
    assert len(found["problems"]) == 1 and "AttributeError" in found["problems"][0]  # type: ignore[index, arg-type]
