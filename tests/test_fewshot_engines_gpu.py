"""What only a GPU shows: a captured step takes the eager engine's steps, and nothing in the loop waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastlora.fewshot.loop import load_checkpoint
from loops import STEPS, loop, losses, weights

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
OPTIONS = [{}, {"average": 0.5, "lr_ratio": 4.0}, {"dtype": torch.float16}, {"dtype": torch.bfloat16}, {"method": "full"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_graph_takes_the_steps_of_eager(options: dict[str, Any]) -> None:
    """Over two epochs with short last batches. The kernels are the same; only launches and who casts the weights differ."""
    eager, graph = loop(GPU, fill=True, **options), loop(GPU, engine="graph", **options)
    with graph._frozen_in():
        expected, found = losses(eager), losses(graph)
    assert graph.engine == "graph", "it fell back"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = weights(graph), weights(eager)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_a_stopped_graph_run_goes_on(tmp_path: Path) -> None:
    whole, first, second = (loop(GPU, engine="graph") for _ in range(3))
    expected = losses(whole)
    losses(first, 3)
    first.save(tmp_path / "c", {})
    second.restore(load_checkpoint(tmp_path / "c"))
    losses(second, STEPS - 3)
    torch.testing.assert_close(second.history, expected.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_waits_for_the_device(engine: str, options: dict[str, Any]) -> None:
    made = loop(GPU, engine=engine, fill=True, iterations=20, **options)
    losses(made, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            made.train_step()
        made.read(wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    made.read()
    assert made.history[:12, 0].all()


def test_fp32_on_a_gpu_follows_the_cpu() -> None:
    torch.testing.assert_close(losses(loop(GPU)).cpu(), losses(loop()), rtol=1e-3, atol=1e-3)
