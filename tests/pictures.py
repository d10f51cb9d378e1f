"""Image folders and a tiny CLIP on disk for the tests of the few-shot job and the command line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

# open_clip's own tokenizer gives ids up to 49407, so the vocabulary has its full size; everything else is tiny.
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def photo(height: int, width: int, seed: int, tint: int = 0) -> np.ndarray:
    """A smooth random RGB picture, uint8 (height, width, 3), in one of six tints."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3)).astype(np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    colour = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)][tint % 6])
    return np.clip(0.4 * pixels + 0.6 * colour, 0, 255).astype(np.uint8)


def make_folder(root: Path, classes: Sequence[str], images: int = 6, side: int = 24) -> Path:
    """root/<class>/<i>.png with `images` pictures of a class, each class in its own tint; gives back root."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(photo(side, side + i, 100 * number + i, number)).save(root / name / f"{i}.png")
    return root


def tiny_clip(folder: Path) -> str:
    """Write a tiny CLIP with random weights to `folder`; its name for --model."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(CLIP(**TINY).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    return f"local-dir:{folder}"


def train_arguments(data: str | Path, out: Path, model: str, *more: str) -> list[str]:
    """Arguments of a small run: 2 shots, 12 steps of 3 images."""
    small = ["--shots", "2", "--iterations", "12", "--batch-size", "3", "--lr", "1e-2", "--device", "cpu"]
    return ["train", str(data), "--out", str(out), "--model", model, "--pretrained", "none", *small, *more]


def command(*arguments: str) -> list[str]:
    """The command line in a process of its own."""
    return [sys.executable, "-m", "fastlora", *arguments]


# so that what is done to a run in another process reaches it in the middle, however fast it is
_PAUSING = """
import sys
from pathlib import Path
from fastlora import cli
from fastlora.fewshot.loop import Loop
after, mark = int(sys.argv[1]), Path(sys.argv[2])
sys.argv = ["fastlora", *sys.argv[3:]]
step, taken = Loop.train_step, []
def train_step(loop):
    step(loop)
    taken.append(loop)
    if len(taken) == after:
        mark.touch()
        sys.stdin.read()
Loop.train_step = train_step
cli.main()
"""


def pausing(after: int, mark: Path, *arguments: str) -> list[str]:
    """The command line in a process of its own, which makes the file `mark` after so many steps and goes on when stdin ends."""
    return [sys.executable, "-c", _PAUSING, str(after), str(mark), *arguments]


class Ran(NamedTuple):
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def one_line(ran: Ran, says: str) -> None:
    """That a command failed as for a mistake of the user's: exit code 2 and one line that `says` what is wrong."""
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert ran.err.startswith("fastlora: ") and says in ran.err, ran.err


def shared_data() -> Path:
    """Where the real images lie; may not exist."""
    given = os.environ.get("FASTLORA_TEST_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
