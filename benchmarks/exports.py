"""Hold what `fastlora train` and `fastlora merge` leave against the model that was trained: the same predictions.

    python benchmarks/exports.py     mini, and a ViT-B-32 with QuickGELU and random weights; minutes, 6 GB of disk in between

200 images of different shapes, cut out of the two photographs that come with scikit-learn. Each way of loading takes images and
prompts as its user would: its own preprocessing, its own tokenizer. Rows go to benchmarks/results/exports.jsonl, and from there
into docs/adapters.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

import fastlora
from fastlora.bench.table import Table
from fastlora.fewshot import mergerun, models, trainer
from fastlora.fewshot.evalrun import adapt, finished, loaded_for
from fastlora.fewshot.recipe import Recipe, templates
from fastlora.fewshot.runfolder import RunFolder
from rows import RESULTS, append, read_rows

FILE = RESULTS / "exports.jsonl"
QUIET = Console(quiet=True)
IMAGES = 200
# Logits are 100 × cosine. This is the largest difference that a way of loading may make; predictions are compared where the
# margin between an image's first two classes is twice as large, since both may move.
EXACT = 1e-3
# transformers' own processor cuts some images a pixel beside where open_clip's centre crop does: more at 64 pixels than at 224.
OWN_PIXELS = "transformers, its own processor"


@dataclasses.dataclass(frozen=True)
class Case:
    """A base model: its name in open_clip, its tag, steps that adapt it, and the bound where a processor cuts elsewhere."""

    model: str
    pretrained: str | None
    steps: int
    batch: int
    own_pixels: float = 1.0


def cases() -> list[Case]:
    """Return what the table has rows of."""
    return [Case("mini", None, 30, 16, 10.0), Case("ViT-B-32", "openai", 6, 8)]


@contextlib.contextmanager
def stand_in(model: str, tag: str, folder: Path, config: dict[str, Any] | None = None) -> Iterator[None]:
    """Serve random weights under a tag of open_clip's whose weights were trained with QuickGELU, as the hub would.

    Args:
        folder: for the file of weights.
        config: a smaller architecture under the same name; None for the real one.
    """
    import open_clip
    from open_clip import factory, pretrained

    configs, tags = dict(factory._MODEL_CONFIGS), pretrained._PRETRAINED
    configs[model] = config or configs[model]
    file = folder / f"{tag}.pt"
    entry = {k: v for k, v in tags[model][tag].items() if k not in ("url", "hf_hub")} | {"file": str(file)}
    served = {**tags, model: {**tags[model], tag: entry}}
    with mock.patch.object(factory, "_MODEL_CONFIGS", configs), mock.patch.object(pretrained, "_PRETRAINED", served):
        torch.manual_seed(0)
        with models.quiet():
            weights = open_clip.create_model(model, force_quick_gelu=True).state_dict()
        # as large as trained ones: where c_fc gives small numbers, GELU and QuickGELU are one function
        torch.save({name: 20 * w if name.endswith("mlp.c_fc.weight") else w for name, w in weights.items()}, file)
        yield


def photographs(folder: Path, count: int, shots: int = 4) -> Path:
    """Write a train and a test split of 8 classes, the quarters of two photographs; `count` test images of any shape."""
    from sklearn.datasets import load_sample_images

    draw = random.Random(0)
    for split, images in (("train", 8 * shots), ("test", count)):
        for number in range(images):
            label = number % 8
            name, photograph = (("temple", "flower")[label // 4], load_sample_images().images[label // 4])
            place = ("above left", "above right", "below left", "below right")[label % 4]
            high, wide = photograph.shape[0] // 2, photograph.shape[1] // 2
            h, w = draw.randint(60, high), draw.randint(60, wide)
            top = (label % 4 // 2) * high + draw.randint(0, high - h)
            left = (label % 2) * wide + draw.randint(0, wide - w)
            where = folder / split / f"{name} {place}"
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[top : top + h, left : left + w]).save(where / f"{number}.png")
    return folder


def trained(case: Case, data: Path, out: Path) -> RunFolder:
    """Carry out a short run, with steps large enough to change its predictions."""
    recipe = Recipe(
        model=case.model, pretrained=case.pretrained, shots=2, iterations=case.steps, batch_size=case.batch, lr=3e-3,
        lora=fastlora.LoRAConfig(targets=("q", "k", "v", "o", "fc1", "fc2"), rank=4),
    )  # fmt: skip
    trainer.run(trainer.Job(recipe, str(data), out, device="cpu", brief=True), QUIET)
    return RunFolder(out)


def paths(data: Path, classes: list[str]) -> tuple[list[Path], Tensor]:
    """Return the test images and their labels."""
    files = [path for name in classes for path in sorted((data / "test" / name).iterdir())]
    return files, torch.tensor([classes.index(path.parent.name) for path in files])


@torch.no_grad()
def logits(encode: Any, files: list[Path], prompts: list[str]) -> Tensor:
    """Return 100 × cosine, (images, classes); `encode` takes Pillow's images and prompts and gives features of both."""
    opened = [Image.open(path).convert("RGB") for path in files]
    parts = [encode(opened[start : start + 50], prompts) for start in range(0, len(opened), 50)]
    text = F.normalize(parts[0][1].float(), dim=-1)
    return 100 * F.normalize(torch.cat([image.float() for image, _ in parts]), dim=-1) @ text.T


def by_open_clip(model: Any, preprocess: Any, tokenizer: Any) -> Any:
    """Return an encoder for `logits` of what open_clip's lines built."""
    return lambda images, prompts: (
        model.eval().encode_image(torch.stack([preprocess(image) for image in images])),
        model.encode_text(tokenizer(prompts)),
    )


def by_transformers(model: Any, processor: Any, preprocess: Any = None) -> Any:
    """Return an encoder for `logits` of what transformers' lines built; `preprocess` may make the pixels instead."""

    def encode(images: list[Image.Image], prompts: list[str]) -> tuple[Tensor, Tensor]:
        given = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        pixels = given.pop("pixel_values")
        if preprocess is not None:
            pixels = torch.stack([preprocess(image) for image in images])
        image, text = model.eval().get_image_features(pixel_values=pixels), model.get_text_features(**given)
        return getattr(image, "pooler_output", image), getattr(text, "pooler_output", text)

    return encode


def ways(case: Case, run: RunFolder, here: Path) -> Iterator[tuple[str, Any]]:
    """Yield each way to load what the run left, and its encoder."""
    import open_clip
    import transformers

    mergerun.run(run, here / "merged", "fp32", QUIET)
    local = f"local-dir:{here / 'merged'}"
    with models.quiet():
        model, _, preprocess = open_clip.create_model_and_transforms(local)
        tokenizer = open_clip.get_tokenizer(local)
    yield "open_clip, the folder", by_open_clip(model, preprocess, tokenizer)
    model, processor = (kind.from_pretrained(here / "merged") for kind in (transformers.CLIPModel, transformers.CLIPProcessor))
    yield "transformers, open_clip's pixels", by_transformers(model, processor, preprocess)
    yield OWN_PIXELS, by_transformers(model, processor)
    quick = {"force_quick_gelu": True}
    if case.pretrained is not None:
        mergerun.run(run, here / "merged.safetensors", "fp32", QUIET)
        with models.quiet():
            model = open_clip.create_model(case.model, pretrained=str(here / "merged.safetensors"), **quick)
        yield "open_clip, the file", by_open_clip(model, preprocess, tokenizer)
    if case.model == "mini":
        model, tokenizer = fastlora.mini.load()
    else:
        with models.quiet():
            model, _, preprocess = open_clip.create_model_and_transforms(case.model, case.pretrained, **quick)
    fastlora.load(model, run.adapter)
    yield "fastlora.load", by_open_clip(model, preprocess, tokenizer)


def measure(case: Case, here: Path, images: int = IMAGES) -> Iterator[dict[str, Any]]:
    """Train, and yield one row per way of loading; the last is of the same weights under the other activation."""
    data = photographs(here / "photographs", images)
    run = trained(case, data, here / "run")
    config, recipe = finished(run)
    loaded = loaded_for(config, recipe, torch.device("cpu"), QUIET)
    adapt(loaded.model, recipe, run)
    files, labels = paths(data, config["classes"])
    prompts = [t.format(name) for name in config["classes"] for t in templates(config["template"])]
    from open_clip.transform import PreprocessCfg, image_transform_v2

    preprocess = image_transform_v2(PreprocessCfg(**loaded.model.visual.preprocess_cfg), is_train=False)
    truth = logits(by_open_clip(loaded.model, preprocess, loaded.tokenizer), files, prompts)
    accuracy = 100 * float((truth.argmax(1) == labels).double().mean())
    recorded = json.loads(run.metrics.read_text())["accuracy"]
    if abs(accuracy - recorded) > 100 * 2 / len(files):
        raise AssertionError(f"the run wrote {recorded} %, its adapter gives {accuracy} % now")
    top = truth.topk(2).values
    margin = top[:, 0] - top[:, 1]
    common = {"row": "export", "model": case.model, "pretrained": case.pretrained, "images": len(files)}
    other = by_open_clip(_other_activation(loaded.model), preprocess, loaded.tokenizer)
    for way, encode in [*ways(case, run, here), ("the other activation", other)]:
        found = logits(encode, files, prompts)
        bound = case.own_pixels if way == OWN_PIXELS else EXACT
        clear = margin > 2 * bound
        equal = found.argmax(1)[clear] == truth.argmax(1)[clear]
        yield common | {
            "way": way, "bound": bound, "difference": float((found - truth).abs().max()), "clear": int(clear.sum()),
            "equal": int(equal.sum()), "smallest_margin": float(margin.min()),
        }  # fmt: skip


def _other_activation(model: Any) -> Any:
    """Return `model` with GELU for QuickGELU, or the other way round, in all of its blocks."""
    from open_clip.transformer import QuickGELU

    for block in (*model.transformer.resblocks, *model.visual.transformer.resblocks):
        quick = isinstance(block.mlp.gelu, QuickGELU)
        block.mlp.gelu = torch.nn.GELU() if quick else QuickGELU()
    return model


def right(row: dict[str, Any]) -> bool:
    """Return whether a way of loading gives the trained model's logits within the bound, and its predictions where clear."""
    return bool(row["difference"] <= row["bound"] and row["equal"] == row["clear"])


def table() -> str:
    """Return the table of the newest rows."""
    rows = {(row["model"], row["way"]): row for row in read_rows(FILE)} if FILE.is_file() else {}
    if not rows:
        return "Not yet measured."
    titles = ("base", "loaded by", "largest difference of a logit", "bound", "clear images", "same prediction")
    named = {"mini": "mini CLIP, GELU", "ViT-B-32": "ViT-B-32, QuickGELU"}
    cells = []
    for (model, way), row in rows.items():
        bound = "must exceed" if way == "the other activation" else f"{row['bound']:g}"
        cells.append(
            (named[model], way, f"{row['difference']:.1e}", bound, f"{row['clear']} of {row['images']}", str(row["equal"]))
        )
    return Table("", titles, cells).markdown()


def main() -> int:
    """Measure every case; 1 if a way of loading gives another model."""
    import machine

    wrong = 0
    for case in cases():
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as lent:
            here = Path(folder)
            if case.pretrained is not None:
                lent.enter_context(stand_in(case.model, case.pretrained, here))
            for row in measure(case, here):
                append(FILE, row | machine.environment(torch.device("cpu")))
                good = right(row) != (row["way"] == "the other activation")
                wrong += not good
                told = f"{row['difference']:.2e} {row['equal']}/{row['clear']}"
                print(f"{case.model:10} {row['way']:32} {told} {'' if good else 'WRONG'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
