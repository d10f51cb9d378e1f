"""Images decoded by worker processes: the pixels of the store in memory, the same workers all the way, none left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastlora.fewshot.batches import Draws
from fastlora.fewshot.datasets import Item
from fastlora.fewshot.errors import UserError
from fastlora.fewshot.images import Decoded, decode_training
from fastlora.fewshot.recipe import Recipe
from fastlora.fewshot.store import OnCPU, OnDevice, Pinned
from fastlora.fewshot.stream import Stream
from loops import CPU
from pictures import photo
from waiting import wait

MAX_SIDE, SIZE = 24, 16
DRAWS = Recipe(batch_size=3, seed=4)
STEPS = 6  # two epochs of 7 images: 3, 3, 1


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    """Seven images of different sizes, of which one is shrunk and one turned."""
    for i in range(7):
        exif = Image.Exif()
        exif[0x0112] = 6 if i == 3 else 1
        height = 60 if i == 5 else 20
        Image.fromarray(photo(height, 22 + 2 * i, i)).save(tmp_path / f"{i}.png", exif=exif)
    return [Item(i % 2, f"{i}.png", tmp_path / f"{i}.png") for i in range(7)]


def decoded(items: list[Item], where: str = "memory") -> Decoded:
    into = Decoded()
    decode_training(items, MAX_SIDE, into, Console(quiet=True), where)
    return into


def stream(items: list[Item], device: torch.device = CPU) -> Stream:
    sizes = decoded(items, "stream").sizes
    return Stream(items, torch.tensor([sizes[item.name] for item in items]), MAX_SIDE, SIZE, device, workers=2)


def workers(of: Stream) -> list[int]:
    return [worker.pid for worker in of._batches._workers]  # type: ignore[union-attr]


def wait_until_gone(processes: list[int]) -> None:
    wait(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


@pytest.mark.parametrize("fill", [False, True], ids=["short", "filled"])
def test_pixels_are_those_of_memory_and_workers_stay(items: list[Item], fill: bool) -> None:
    images = [decoded(items).images[item.name] for item in items]
    kept, streamed = OnCPU(images, SIZE), stream(items)
    assert torch.equal(kept.sizes, streamed.sizes)
    draws = Draws(DRAWS, kept.sizes, True, fill=fill)
    streamed.begin(draws, 1, STEPS)
    processes = workers(streamed)
    for step in range(1, STEPS):
        assert torch.equal(streamed.fetch(draws(step)), kept.fetch(draws(step))), step
        assert workers(streamed) == processes
    streamed.close()
    wait_until_gone(processes)


def test_for_a_gpu_whole_images_are_handed_over(items: list[Item]) -> None:
    """What `Pinned` sends, and what `OnDevice` cuts: one set of crops wherever the images lie."""
    from fastlora.fewshot.batches import Feed

    images = [decoded(items).images[item.name] for item in items]
    pinned, resident = Pinned(images, SIZE), OnDevice(images, SIZE, CPU)
    streamed = stream(items, torch.device("meta"))
    draws = Draws(DRAWS, pinned.sizes, True)
    assert streamed.shape == pinned.shape
    streamed.begin(draws, 0, 3)
    for step in range(3):
        draw = draws(step)
        pixels = streamed.fetch(draw)
        assert torch.equal(pixels, torch.stack(pinned.fetch(draw)))
        crops = [
            store.crops(Feed(3, store.shape, CPU)(draw, sent))
            for store, sent in ((streamed, pixels), (pinned, pinned.fetch(draw)), (resident, None))
        ]
        assert torch.equal(crops[0], crops[1]) and torch.equal(crops[0], crops[2])
    streamed.close()


def test_a_file_that_is_gone_is_named(items: list[Item], tmp_path: Path) -> None:
    streamed = stream(items)
    (tmp_path / "2.png").unlink()
    draws = Draws(DRAWS, streamed.sizes, True)
    streamed.begin(draws, 0, STEPS)
    processes = workers(streamed)
    with pytest.raises(UserError, match=r"2\.png \(.*cannot be read any more"):
        for step in range(STEPS):
            streamed.fetch(draws(step))
    streamed.close()
    wait_until_gone(processes)


def test_a_worker_that_is_killed_is_an_error_not_a_hang(items: list[Item]) -> None:
    streamed = stream(items)
    draws = Draws(DRAWS, streamed.sizes, True)
    streamed.begin(draws, 0, 10**6)
    for process in workers(streamed):
        os.kill(process, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        for step in range(1000):
            streamed.fetch(draws(step))
            time.sleep(0.01)
    streamed.close()


def test_no_lock_stays_with_a_worker_that_is_killed(items: list[Item]) -> None:
    """Workers ask all the time whether they are to end: torch's own event takes a lock for that, for ever if killed."""
    streamed = stream(items)
    streamed.begin(Draws(DRAWS, streamed.sizes, True), 0, 10)
    event = streamed._batches._workers_done_event  # type: ignore[union-attr]
    assert not event.is_set() and not hasattr(event, "_cond")
    streamed.close()


def test_workers_leave_signals_to_their_parent(items: list[Item]) -> None:
    streamed = stream(items)
    draws = Draws(DRAWS, streamed.sizes, True)
    streamed.begin(draws, 0, STEPS)
    streamed.fetch(draws(0))
    streamed.fetch(draws(1))  # both workers are up by now
    for process in workers(streamed):
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGTERM)
    for step in range(2, STEPS):
        streamed.fetch(draws(step))
    streamed.close()
