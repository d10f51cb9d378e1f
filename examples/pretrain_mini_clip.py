"""Pretrain the mini CLIP that ships with fastlora, on a CPU, in a fixed number of minutes.

    python examples/pretrain_mini_clip.py tiny-imagenet-64.zip --minutes 75 --out mini-run

The data is Tiny-ImageNet-200 as one stored zip: train/<wnid>/*.webp, val/<wnid>/*.webp, classnames.json.

Loss: class-wise image-text cross-entropy. Each step encodes one caption per class (a random template around the class
name) and every image of the batch is classified among the 200 caption features, so no pair of the batch is a false
negative. The learning rate, the image size and the end of the run follow the share of the time budget that has passed,
not a number of steps: a busy machine sees fewer images, never an unfinished schedule.

What makes it fit a CPU: bf16 matrix products (AMX where the processor has it), attention as two batched products (torch's
flash attention is slow backward in bf16 on a CPU), small images first (40, 48, then 64 px: 25, 36, 64 patches), one embedding
row per token that the captions use, and Muon for the matrices of the blocks.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file, save_file

CONFIG = Path(__file__).parents[1] / "fastlora" / "mini" / "config.json"
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
# (share of the time budget, image size); a patch is 8 px at every size.
SIZES = ((0.0, 40), (0.40, 48), (0.68, 64))
WARMUP, LABEL_SMOOTHING = 0.02, 0.1

TEMPLATES = (
    "a photo of a {}.", "a photo of the {}.", "a photo of one {}.", "a photo of many {}.", "a good photo of a {}.",
    "a bad photo of a {}.", "a blurry photo of a {}.", "a cropped photo of the {}.", "a close-up photo of a {}.",
    "a low resolution photo of a {}.", "a bright photo of a {}.", "a dark photo of the {}.", "a small photo of a {}.",
    "a photo of a large {}.", "a photo of a small {}.", "a photo of my {}.", "a picture of a {}.", "a picture of the {}.",
    "an image of a {}.", "an image of the {}.", "a snapshot of a {}.", "this is a {}.", "there is a {} in the scene.",
    "a {} in the wild.", "a {} seen from the side.", "a {} from above.", "the {}.", "a {}.", "{}.", "{}",
)  # fmt: skip


def read_split(archive: zipfile.ZipFile, split: str, wnids: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, uint8 (n, 64, 64, 3), and their labels, int64 (n,)."""
    names = [n for n in archive.namelist() if n.startswith(f"{split}/") and n.endswith(".webp")]
    images = np.empty((len(names), 64, 64, 3), np.uint8)
    for i, name in enumerate(track(names, f"decoding {split}")):
        images[i] = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
    label_of = {w: i for i, w in enumerate(wnids)}
    return torch.from_numpy(images), torch.tensor([label_of[n.split("/")[1]] for n in names])


def augment(images: torch.Tensor, size: int) -> torch.Tensor:
    """Random resized crop (area 0.3 to 1), flip, brightness and contrast of uint8 images; bf16 (n, 3, size, size)."""
    n = len(images)
    x = images.permute(0, 3, 1, 2).float().div_(255)
    area = torch.empty(n).uniform_(0.3, 1.0)
    ratio = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    w, h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    flip = torch.randint(0, 2, (n,)) * 2.0 - 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = w * flip, h
    theta[:, 0, 2] = (1 - w) * torch.empty(n).uniform_(-1, 1)
    theta[:, 1, 2] = (1 - h) * torch.empty(n).uniform_(-1, 1)
    x = F.grid_sample(x, F.affine_grid(theta, [n, 3, size, size], align_corners=False), align_corners=False)
    x = x * torch.empty(n, 3, 1, 1).uniform_(0.75, 1.25) * torch.empty(n, 1, 1, 1).uniform_(0.7, 1.3)
    return normalise(x)


def normalise(x: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((x - mean) / std).bfloat16()


class Towers:
    """open_clip's own parameters, run in bf16 with the shortest sequence that holds the input."""

    def __init__(self, model: CLIP, tokens: torch.Tensor) -> None:
        self.model, self.visual = model, model.visual
        used, index = tokens.unique(return_inverse=True)
        self.used, self.tokens = used, index  # tokens as rows of the compact table
        self.eot = tokens.argmax(-1)
        self.table = torch.nn.Parameter(model.token_embedding.weight.detach()[used].clone())

    @staticmethod
    def half(p: torch.Tensor) -> torch.Tensor:
        return p.to(torch.bfloat16)

    def norm(self, layer: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, layer.normalized_shape, self.half(layer.weight), self.half(layer.bias))

    def linear(self, layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.half(layer.weight), self.half(layer.bias))

    def block(self, block: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        n, length, width = x.shape
        heads = block.attn.num_heads
        h = self.norm(block.ln_1, x)
        qkv = F.linear(h, self.half(block.attn.in_proj_weight), self.half(block.attn.in_proj_bias))
        q, k, v = qkv.view(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = torch.matmul(q * (width // heads) ** -0.5, k.transpose(-1, -2))
        scores = scores if mask is None else scores + mask
        h = torch.matmul(scores.softmax(-1), v).transpose(1, 2).reshape(n, length, width)
        x = x + self.linear(block.attn.out_proj, h)
        return x + self.linear(block.mlp.c_proj, F.gelu(self.linear(block.mlp.c_fc, self.norm(block.ln_2, x))))

    def image(self, x: torch.Tensor) -> torch.Tensor:
        """bf16 images (n, 3, s, s), s a multiple of 8 -> unit features (n, embed_dim), fp32."""
        v, n, grid = self.visual, len(x), x.shape[-1] // 8
        x = x.view(n, 3, grid, 8, grid, 8).permute(0, 2, 4, 1, 3, 5).reshape(n, grid * grid, 192)
        x = F.linear(x, self.half(v.conv1.weight).reshape(v.conv1.out_channels, -1))
        pos = v.positional_embedding[1:]
        if grid != 8:
            pos = pos.view(1, 8, 8, -1).permute(0, 3, 1, 2)
            pos = F.interpolate(pos, (grid, grid), mode="bilinear", antialias=True).flatten(2)[0].T
        x = x + self.half(pos)
        cls = self.half(v.class_embedding + v.positional_embedding[0]).expand(n, 1, -1)
        x = self.norm(v.ln_pre, torch.cat([cls, x], 1))
        for block in v.transformer.resblocks:
            x = self.block(block, x, None)
        return F.normalize((self.norm(v.ln_post, x[:, 0]) @ self.half(v.proj)).float(), dim=-1)

    def text(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the caption table (n,) -> unit features (n, embed_dim), fp32."""
        m, eot = self.model, self.eot[rows]
        length = int(eot.max()) + 1
        x = self.half(self.table[self.tokens[rows, :length]] + m.positional_embedding[:length])
        mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
        for block in m.transformer.resblocks:
            x = self.block(block, x, mask)
        x = self.norm(m.ln_final, x)[torch.arange(len(rows)), eot]
        return F.normalize((x @ self.half(m.text_projection)).float(), dim=-1)

    @torch.no_grad()
    def write_back(self) -> None:
        """Put the trained rows in their places; tokens that no caption uses get rows of the same size.

        Left at their initial, five times smaller values they vanish beside the template's: all prompts with a new word were
        alike (mean cosine 0.52 among Caltech101's class prompts, 0.29 so).
        """
        weight = self.model.token_embedding.weight
        unused = torch.ones(len(weight), dtype=torch.bool).index_fill_(0, self.used, False)
        generator = torch.Generator().manual_seed(0)
        weight[unused] = torch.randn(int(unused.sum()), weight.shape[1], generator=generator) * self.table.std()
        weight[self.used] = self.table


def zero_shot(towers: Towers, images: torch.Tensor, labels: torch.Tensor, classes: int, templates: int) -> float:
    """Accuracy in percent, each class the normalised mean of its caption features."""
    hits = 0
    with torch.no_grad():
        text = towers.text(torch.arange(classes * templates)).view(classes, templates, -1).mean(1)
        for x, y in zip(images.split(500), labels.split(500), strict=True):
            features = towers.image(normalise(x.permute(0, 3, 1, 2).float() / 255))
            hits += int(((features @ text.T).argmax(1) == y).sum())
    return 100 * hits / len(labels)


def optimizers(model: CLIP, towers: Towers, lr: float) -> list[torch.optim.Optimizer]:
    blocks = [*model.visual.transformer.resblocks.parameters(), *model.transformer.resblocks.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    chosen = {id(p) for p in matrices} | {id(model.token_embedding.weight)}
    rest = [p for p in model.parameters() if id(p) not in chosen] + [towers.table]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in rest if p.ndim > 1], lr=lr, weight_decay=0.05, betas=(0.9, 0.98)),
        torch.optim.AdamW([p for p in rest if p.ndim <= 1], lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def save(model: CLIP, towers: Towers, out: Path) -> None:
    towers.write_back()
    tensors = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, out / "model.tmp")
    os.replace(out / "model.tmp", out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="tiny-imagenet-64.zip")
    parser.add_argument("--minutes", type=float, default=75, help="time budget of the training itself")
    parser.add_argument("--batch", type=int, default=256, help="images a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("mini-run"), help="model.safetensors (fp16) and log.jsonl")
    parser.add_argument("--resume", action="store_true", help="go on from the last weights in --out (moments start anew)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    random.seed(args.seed)

    with zipfile.ZipFile(args.data) as archive:
        names = json.loads(archive.read("classnames.json"))
        wnids = sorted(names)
        train_x, train_y = read_split(archive, "train", wnids)
        val_x, val_y = read_split(archive, "val", wnids)
    captions = [t.format(names[w]) for w in wnids for t in TEMPLATES]
    model = CLIP(**json.loads(CONFIG.read_text()))
    done = dict(step=0, seconds=0, epochs=0.0)
    if args.resume:
        model.load_state_dict({k: v.float() for k, v in load_file(args.out / "model.safetensors").items()})
        rows = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
        done = [row for row in rows if "val_accuracy_2000" in row][-1]
        torch.manual_seed(args.seed + done["step"])  # other crops and orders than before
    towers = Towers(model, open_clip.SimpleTokenizer()(captions))
    classes, templates = len(wnids), len(TEMPLATES)
    opts = optimizers(model, towers, args.lr)
    forward = torch.compile(towers.image, dynamic=False)

    start, last_save = time.time() - done["seconds"], time.time()
    step, seen = done["step"], round(done["epochs"] * len(train_x))
    order, at = torch.randperm(len(train_x)), 0
    mean_loss = mean_hit = 0.0
    with open(args.out / "log.jsonl", "a" if args.resume else "w") as log:
        while (share := (time.time() - start) / (60 * args.minutes)) < 1:
            size = next(s for begin, s in reversed(SIZES) if share >= begin)
            # warm up, hold, and fall to zero over the second half
            lr = args.lr * min(share / WARMUP, 1.0, 2 * (1 - share) + 0.005)
            for opt in opts:
                for group in opt.param_groups:
                    group["lr"] = lr
            if at + args.batch > len(order):
                order, at = torch.randperm(len(train_x)), 0
            batch, at = order[at : at + args.batch], at + args.batch
            x, y = augment(train_x[batch], size), train_y[batch]
            text = towers.text(torch.arange(classes) * templates + torch.randint(templates, (classes,)))
            logits = model.logit_scale.exp() * forward(x) @ text.T
            loss = F.cross_entropy(logits, y, label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for o in opts for g in o.param_groups for p in g["params"]], 1.0)
            for opt in opts:
                opt.step()
                opt.zero_grad()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            step, seen = step + 1, seen + args.batch
            hit = float((logits.argmax(1) == y).float().mean())
            keep = min(0.98, 1 - 1 / (step - done["step"]))
            mean_loss, mean_hit = keep * mean_loss + (1 - keep) * loss.item(), keep * mean_hit + (1 - keep) * hit
            if step % 50 == 0:
                row = dict(step=step, seconds=round(time.time() - start), size=size, lr=lr)
                row |= dict(epochs=round(seen / len(train_x), 3), loss=round(mean_loss, 4))
                row["train_accuracy"] = round(100 * mean_hit, 2)
                if time.time() - last_save > 420:
                    row["val_accuracy_2000"] = zero_shot(towers, val_x[::5], val_y[::5], classes, templates)
                    save(model, towers, args.out)
                    last_save = time.time()
                print(json.dumps(row), file=log, flush=True)
                print(row, flush=True)
        save(model, towers, args.out)
        row = dict(step=step, seconds=round(time.time() - start), epochs=round(seen / len(train_x), 3))
        row["val_accuracy"] = zero_shot(towers, val_x, val_y, classes, templates)
        print(json.dumps(row), file=log)
        print(row)


if __name__ == "__main__":
    main()
