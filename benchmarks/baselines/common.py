"""One few-shot training job on one open_clip model: the host, its inputs, the adapters all start from, and what a step is."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
from collections.abc import Callable
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import mini
from fastlora.encoders import cast

TEMPLATE = "a photo of a {}."
# Words that open_clip's tokenizer keeps in one piece, from which class names of any length are made.
WORDS = [
    "cat", "dog", "bird", "fish", "horse", "bear", "wolf", "fox", "lion", "tiger", "snake", "frog", "house", "car", "bus",
    "train", "boat", "plane", "chair", "table", "lamp", "clock", "phone", "camera", "guitar", "piano", "drum", "flag",
    "tower", "bridge", "castle", "church", "garden", "river", "lake", "island", "mountain", "forest", "beach", "apple",
    "banana", "orange", "lemon", "bread", "cheese", "pizza", "cake", "coffee", "tea", "wine", "bottle", "cup", "bowl",
    "plate", "knife", "fork", "spoon", "hat", "shirt", "coat", "shoe", "bag"
]  # fmt: skip
# How many of 100 ImageNet class names have 1, 2, … tokens, so that prompts come out at 8 to 18 tokens, 9.2 on average.
NAME_LENGTHS = [1] * 38 + [2] * 38 + [3] * 14 + [4] * 6 + [5] * 2 + [7] + [11]


@dataclasses.dataclass(frozen=True)
class Job:
    """What is trained: the recipe of CLIP-LoRA (q, k, v of both encoders) on random weights and images.

    model: a name of open_clip's list, or "mini" for the model that ships with fastlora. The paper's are OpenAI's, whose
        activation is QuickGELU: "ViT-B-32" alone is open_clip's, with GELU.
    depth, width: blocks and width of both towers, for "mini" only; None for its own.
    """

    model: str = "ViT-B-32-quickgelu"
    classes: int = 100
    batch: int = 32
    rank: int = 2
    dropout: float = 0.25
    device: str = "cpu"
    seed: int = 0
    depth: int | None = None
    width: int | None = None

    @property
    def name(self) -> str:
        size = "".join(f" {key} {value}" for key in ("depth", "width") if (value := getattr(self, key)) is not None)
        return f"{self.model}{size} batch {self.batch} classes {self.classes} r={self.rank} p={self.dropout:g}"

    def row(self) -> dict[str, Any]:
        """What a results file keeps of it."""
        return {"case": self.name, **dataclasses.asdict(self)}

    @property
    def scale(self) -> float:
        return 1.0 / self.rank**0.5


# (tower, block, projection) -> (A (R, K), B (K, R)), fp32; projections 0, 1, 2 are q, k, v
Adapters = dict[tuple[str, int, int], tuple[Tensor, Tensor]]


def host(job: Job) -> Any:
    """The open_clip model at random weights of the job's seed, in training mode."""
    return copy.deepcopy(built(job.model, job.seed, job.depth, job.width)).to(job.device).train()


@functools.lru_cache(maxsize=1)
def built(model: str, seed: int, depth: int | None, width: int | None) -> Any:
    """The host itself, on the CPU: drawing 150 million random weights takes longer than a copy."""
    torch.manual_seed(seed)
    made = _mini(depth, width) if model == "mini" else open_clip.create_model(model)
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)  # they start at zero, where one that is lost would not show
    return made


def _mini(depth: int | None, width: int | None) -> Any:
    """The mini CLIP, or the same with towers of another depth or width."""
    if depth is None and width is None:
        return mini.build()
    config = json.loads((mini.FOLDER / "config.json").read_text())
    for tower in ("vision_cfg", "text_cfg"):
        config[tower] |= {"layers": depth} if depth is not None else {}
        config[tower] |= {"width": width} if width is not None else {}
    if width is not None:
        config["text_cfg"]["heads"] = max(1, width // 64)
    return open_clip.CLIP(**config)


def blocks(model: Any) -> dict[str, list[Any]]:
    """The residual blocks of each tower of an open_clip CLIP, bottom first."""
    return {"vision": list(model.visual.transformer.resblocks), "text": list(model.transformer.resblocks)}


def prompts(job: Job) -> list[str]:
    """One prompt a class, of ImageNet-like length."""
    draw = random.Random(job.seed)
    return [TEMPLATE.format(" ".join(draw.choices(WORDS, k=NAME_LENGTHS[i % 100]))) for i in range(job.classes)]


def few_prompts(job: Job, number: int) -> list[str]:
    """One prompt a class for a job of few classes: lengths and words drawn anew for each number."""
    draw = random.Random(f"{job.seed} {number}")
    return [TEMPLATE.format(" ".join(draw.choices(WORDS, k=draw.choice((1, 2, 3, 4, 7, 11))))) for _ in range(job.classes)]


@functools.cache
def _image_side(model: str) -> int:
    if model == "mini":
        built: Any = mini.build()
        return built.visual.image_size[0]
    return open_clip.get_model_config(model)["vision_cfg"]["image_size"]


def inputs(job: Job, number: int) -> tuple[Tensor, Tensor]:
    """images (batch, 3, H, W), fp32, and labels (batch,): one batch, already on the device, for every contestant alike."""
    side = _image_side(job.model)
    generator = torch.Generator().manual_seed(job.seed * 1000 + number)
    images = torch.randn(job.batch, 3, side, side, generator=generator)
    labels = torch.randint(job.classes, (job.batch,), generator=generator)
    return images.to(job.device), labels.to(job.device)


def starting_adapters(job: Job) -> Adapters:
    """A as every LoRA starts, B small but not zero, so that every gradient can be checked."""
    model = built(job.model, job.seed, job.depth, job.width)
    generator = torch.Generator().manual_seed(job.seed)
    adapters: Adapters = {}
    for tower, rows in blocks(model).items():
        for block, row in enumerate(rows):
            width = row.attn.embed_dim
            for projection in range(3):
                a = (torch.rand(job.rank, width, generator=generator) * 2 - 1) * width**-0.5
                b = torch.randn(width, job.rank, generator=generator) * 0.02
                adapters[tower, block, projection] = (a.to(job.device), b.to(job.device))
    return adapters


class Trainee:
    """One contestant: a model made ready for training, and its step. Subclasses change what they do differently."""

    name = ""
    trains = "adapters"
    compiles = False  # whether Inductor compiles it, which takes a minute or more a case on a CPU
    packs = False  # whether its text tower skips padding: then 1000 classes fit in memory at once
    half: torch.dtype | None = torch.bfloat16  # the dtype of its autocast on a GPU
    cast_once = True  # frozen weights are put into that dtype before training: autocast would do so at every call

    @classmethod
    def missing(cls) -> str | None:
        """Why this contestant cannot run here, or None."""
        return None

    def __init__(self, job: Job, adapters: Adapters) -> None:
        self.job = job
        self.model = host(job).requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer("ViT-B-32" if job.model == "mini" else job.model)
        self.install(adapters)
        if self.cast_once:
            cast(self.model, self.compute_dtype)
        if trained := self.trained():
            # fused: one kernel on a GPU, and the fastest form on a CPU as well
            capturable = job.device.startswith("cuda")  # so that a CUDA graph can hold the step
            self.optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=1e-2, fused=True, capturable=capturable)
        self.read(prompts(job))

    def read(self, texts: list[str]) -> None:
        """Take these as the prompts of the classes."""
        self.prompts = texts
        self.tokens = self.tokenize(texts).to(self.job.device)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What its products are computed in: `half` on a GPU, fp32 on a CPU."""
        return self.half if self.half is not None and self.job.device.startswith("cuda") else torch.float32

    def autocast(self) -> torch.autocast:
        """Autocast to `half` on a GPU."""
        on = self.compute_dtype != torch.float32
        return torch.autocast(self.job.device, self.half or torch.bfloat16, enabled=on)

    def install(self, adapters: Adapters) -> None:
        """Put the adapters into the model, at these starting values."""
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def image_features(self, images: Tensor) -> Tensor:
        """(batch, D), as the tower gives them."""
        with self.autocast():
            return self.model.encode_image(images)

    def text_features(self, first: int = 0, last: int | None = None) -> Tensor:
        """(classes, D), as the tower gives them, of the classes first … last-1."""
        with self.autocast():
            return self.model.encode_text(self.tokens[first:last])

    def logits(self, images: Tensor) -> Tensor:
        """100 x cosine, fp32 (batch, classes)."""
        image, text = (F.normalize(f.float(), dim=-1) for f in (self.image_features(images), self.text_features()))
        return 100.0 * image @ text.T

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of one batch."""
        return F.cross_entropy(self.logits(images), labels)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One training step."""
        self.loss(images, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def captured_step(self, images: Tensor, labels: Tensor) -> None:
        """The same step in a form that a CUDA graph can hold: nothing is read on the host."""
        self.step(images, labels)

    def gradients(self) -> dict[str, Tensor]:
        """After a backward: gradients by name, those of one tower and kind together: "vision dA", …"""
        raise NotImplementedError


def cut(model: Any, of: Callable[[Tensor], Tensor | None]) -> Adapters:
    """(A, B) of each projection, cut out of what `of` gives for each block's packed lora_A (3, R, D) and lora_B (3D, R)."""
    pairs: Adapters = {}
    for tower, rows in blocks(model).items():
        for block, row in enumerate(rows):
            a, b = of(row.attn.lora_A), of(row.attn.lora_B)
            assert a is not None and b is not None, f"{tower} block {block} got no gradient"
            for projection, pair in enumerate(zip(a, b.chunk(3), strict=True)):
                pairs[tower, block, projection] = pair
    return pairs


def gather(pairs: Adapters) -> dict[str, Tensor]:
    """(dA, dB) of every projection, flat, by tower and kind."""
    found: dict[str, list[Tensor]] = {}
    for (tower, _, _), (da, db) in sorted(pairs.items(), key=lambda item: item[0]):
        found.setdefault(f"{tower} dA", []).append(da.flatten())
        found.setdefault(f"{tower} dB", []).append(db.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


class SeparateAttention(nn.Module):
    """nn.MultiheadAttention with q, k, v as linears of their own, as adapters for nn.Linear need them."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.embed_dim = attention.num_heads, attention.embed_dim
        self.projections = nn.ModuleList()
        for weight, bias in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
            linear.weight, linear.bias = (nn.Parameter(t.detach().clone(), False) for t in (weight, bias))
            self.projections.append(linear)
        self.out_proj = attention.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Self-attention of query (batch, tokens, D) with the host's own (float) mask; no weights are returned."""
        shape = (*query.shape[:2], self.heads, -1)
        q, k, v = (project(query).view(shape).transpose(1, 2) for project in self.projections)
        mask = None if attn_mask is None else attn_mask.to(q.dtype)  # under autocast the products are half precision
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class SeparateTrainee(Trainee):
    """A contestant that adapts separate q, k, v linears; `adapted` gives the module that takes one linear's place."""

    def adapted(self, linear: nn.Linear, a: Tensor, b: Tensor) -> nn.Module:
        """A module with parameters lora_A (R, K) and lora_B (K, R) in the place of `linear`."""
        raise NotImplementedError

    def install(self, adapters: Adapters) -> None:
        self._pairs: Adapters = {}
        for tower, rows in blocks(self.model).items():
            for block, row in enumerate(rows):
                row.attn = SeparateAttention(row.attn)
                for i, linear in enumerate(row.attn.projections):
                    row.attn.projections[i] = module = self.adapted(linear, *adapters[tower, block, i])
                    self._pairs[tower, block, i] = self.pair(module)
        self.model.train()

    def pair(self, module: Any) -> tuple[Tensor, Tensor]:
        """The (A, B) parameters of one adapted module."""
        return module.lora_A, module.lora_B

    def gradients(self) -> dict[str, Tensor]:
        return gather({key: (a.grad, b.grad) for key, (a, b) in self._pairs.items()})  # type: ignore[misc]


class Compiled(Trainee):
    """Before another trainee among the bases: its encoders by torch.compile."""

    compiles = True

    def __init__(self, job: Job, adapters: Adapters) -> None:
        super().__init__(job, adapters)
        self._image = torch.compile(super().image_features, dynamic=False)
        self._text = torch.compile(super().text_features, dynamic=False)

    def image_features(self, images: Tensor) -> Tensor:
        return self._image(images)

    def text_features(self, first: int = 0, last: int | None = None) -> Tensor:
        return self._text(first, last)
