"""What a training step of ViT-B/16 is expected to take: products, attention, passes over memory, kernels and memory.

Images are 32 of 197 tokens (d 768); prompts are 77 tokens long (d 512), ours without padding: 8 each for 10 classes, 9.08 for
more (the tokens of benchmarks/baselines/common.py's prompts). Both towers have 12 blocks.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from expected.layers import works
from expected.model import HOST, HOST_COMPILED, HOST_TRITON, NODE, Expected, Work, cublas, long_sum
from expected.ours import triton
from shapes import Case

BATCH, IMAGE_TOKENS, CONTEXT, BLOCKS, HEAD = 32, 197, 77, 12, 64
TOKENS = {10: 80, 100: 908, 1000: 9080}
SHARED = 5  # first tokens that all prompts share
WEIGHTS = 149.6e6
# Kernels of a step at any number of classes. Four were counted, of ours 208 by Triton; the others follow from the passes of
# their blocks, within a tenth.
KERNELS = {
    "fastlora": 994, "fastlora, share_prefix": 1250, "fastlora, host's encoders": 1200, "cuBLAS beta=1": 1860,
    "textbook": 2101, "the paper's arithmetic": 2594, "PEFT": 2377, "full fine-tuning": 1650,
}  # fmt: skip
OURS_BY_TRITON, LAUNCHES = 208, 7  # of all, and of one layer, forward and backward
COMPILED = 1000  # of the compiled textbook: 24 blocks of about 38, and the optimizer
CONTESTANTS = tuple(KERNELS)
LEAN = ("fastlora", "fastlora, share_prefix")

# Sizes of a tower's activations (2 M d bytes) that a block's passes read and write beside attention and the adapted layer:
# (forward, backward). The hidden layer of the MLP has 4.
ENCODERS = {
    # LayerNorm 2 x 2, two sums with bias before and beta = 1 within the product 2 x 3, silu 8; LayerNorm again 2 x 2 and
    # backward 2 x 3, silu backward 12, sums of the residual's gradient 2 x 3, attention's three gradients into one 6
    "lean": (18, 34),
    # under autocast LayerNorm is cast to fp32 and back 2 x 10, sums 2 x 3, QuickGELU as three kernels 28; LayerNorm and its
    # casts backward 2 x 12, QuickGELU 56, sums 6
    "host": (54, 86),
    # Inductor: LayerNorm with its casts 2 x 3, sums in them 2 x 1, QuickGELU 8; backward the same with one input more
    "compiled": (16, 26),
}
# The same beyond the layer of benchmarks/ops.py that a contestant's step has.
BESIDE = {
    "the paper's arithmetic": (6, 6),  # · scale of three outputs, and of their gradients
    "PEFT": (24, 24),  # x to fp32, dropout in fp32, x' to bf16 for the product, three times, and back
    "full fine-tuning": (6, 15),  # q, k, v apart and together again; sums over dy for four biases 9
}
LAYER = {
    "fastlora, host's encoders": "fastlora triton", "cuBLAS beta=1": "cuBLAS beta=1", "textbook": "textbook",
    "the paper's arithmetic": "dense ΔW", "PEFT": "textbook", "full fine-tuning": "frozen",
}  # fmt: skip
# Sizes of a tower's activations that a block keeps for backward.
KEPT = {
    "lean": 10,  # both sums 2, q, k, v 3, attention's output 1, the hidden layer 4
    # LayerNorm's fp32 inputs 2 x 2, q, k, v and attention's output 4, the hidden layer and its sigmoid 8; packed layers x 1,
    # separate ones three x' and masks 4.5; full fine-tuning the input of every product
    "fastlora, host's encoders": 17, "cuBLAS beta=1": 20.5, "textbook": 20.5, "the paper's arithmetic": 20.5, "PEFT": 20.5,
    "full fine-tuning": 22,
}  # fmt: skip
COMPILED_KEPT = 14  # Inductor computes LayerNorm's output and the sigmoid again
LIVE = 12  # sizes that backward holds at once beside what is kept: the hidden layer's gradients


@dataclasses.dataclass(frozen=True)
class Tower:
    """Tokens, width, sequences, tokens of one, whether attention gets a float mask, blocks that run whole."""

    tokens: int
    width: int
    sequences: int
    length: float
    masked: bool
    blocks: float

    @property
    def size(self) -> float:
        """Bytes of its activations."""
        return 2.0 * self.tokens * self.width


def towers(classes: int, contestant: str) -> tuple[Tower, Tower]:
    """The image and the text tower as a contestant runs them."""
    lean = contestant in LEAN
    # the last block computes keys and values of all rows, the rest for one row of each sequence
    blocks = BLOCKS - 0.75 if lean else BLOCKS
    image = Tower(BATCH * IMAGE_TOKENS, 768, BATCH, IMAGE_TOKENS, False, blocks)
    if not lean:
        return image, Tower(classes * CONTEXT, 512, classes, CONTEXT, True, blocks)
    tokens = TOKENS[classes]
    if contestant == "fastlora, share_prefix":
        tokens += SHARED - SHARED * classes
    return image, Tower(tokens, 512, classes, tokens / classes, False, blocks)


def _attention(tower: Tower) -> float:
    """Microseconds of a block's attention, forward and backward.

    Flash attention works on 128 x 64 scores at a time, whatever a sequence fills of them, at 350 and 250 TFLOP/s; a float mask
    leaves torch's memory-efficient kernel, written for sm_80, at 150 and 100 on 128 x 128.
    """
    rows = 128 * math.ceil(tower.length / 128)
    columns = (128 if tower.masked else 64) * math.ceil(tower.length / (128 if tower.masked else 64))
    flops = 4.0 * rows * columns * HEAD * tower.sequences * tower.width / HEAD
    forward, backward = (150e12, 100e12) if tower.masked else (350e12, 250e12)
    return 1e6 * flops * (1 / forward + 2.5 / backward)


def block(tower: Tower, contestant: str, engine: str = "graph") -> dict[str, Work]:
    """One block, forward and backward, by part, its kernels not counted."""
    m, d = tower.tokens, tower.width
    case = Case("qkv", m, d, 3 * d, 3, 2, 0.25, torch.bfloat16)
    kind = "compiled" if engine == "compile" else "lean" if contestant in LEAN else "host"
    sizes = sum(ENCODERS[kind]) + sum(BESIDE.get(contestant, (0, 0)))
    rest = ((d, d), (d, 4 * d), (4 * d, d))
    products = sum(cublas(m, k, n) + cublas(m, n, k) for k, n in rest)
    if contestant == "full fine-tuning":
        products += sum(long_sum(m, k, n) for k, n in ((d, 3 * d), *rest))
    name = "torch.compile(textbook)" if engine == "compile" else LAYER.get(contestant, "fastlora triton")
    if name == "fastlora triton":
        layer = Work(triton(case).both - LAUNCHES * NODE)
    else:
        layer = dataclasses.replace(sum(works(case, name), Work()), kernels=0)
    passes = Work(0.0, tower.size * sizes)
    return {"q, k, v": layer, "other products": Work(products), "attention": Work(_attention(tower)), "passes": passes}


def _device(classes: int, contestant: str, engine: str) -> tuple[Work, str]:
    """All work of a step, and its arithmetic."""
    total, words = Work(), []
    for name, tower in zip(("image", "text"), towers(classes, contestant), strict=True):
        whole = sum(block(tower, contestant, engine).values(), Work())
        total += whole.times(tower.blocks)
        words.append(f"{name} {tower.blocks:g} × {whole.busy:.0f}")
    # patches: 2 M d d, forward only, the images cast before; prompts gathered
    ends = Work(cublas(BATCH * IMAGE_TOKENS, 768, 768), 6.0 * BATCH * 3 * 224**2 + 3 * towers(classes, contestant)[1].size)
    if contestant == "full fine-tuning":
        # AdamW reads 16 bytes a weight and writes 12; casts to bf16 and gradients back, 6 each
        ends += Work(0.0, WEIGHTS * (28 + 6 + 6))
    total += ends
    words.append(f"ends {ends.busy:.0f}")
    return total, " + ".join(words)


def peak(classes: int, contestant: str, engine: str = "as written") -> float:
    """Bytes above what the process held before the first step: what is kept, what backward holds, optimizer and gradients."""
    both = towers(classes, contestant)
    kept = KEPT["lean" if contestant in LEAN else contestant] if engine != "compile" else COMPILED_KEPT
    total = sum(kept * tower.size * tower.blocks for tower in both) + LIVE * max(tower.size for tower in both)
    if contestant == "full fine-tuning":
        total += WEIGHTS * (4 + 8 + 2)  # gradients and two moments in fp32, weights in bf16
    return total


def step(classes: int, contestant: str, engine: str) -> Expected:
    """A whole step by engine "as written", "graph" or "compile" (of the textbook)."""
    work, text = _device(classes, contestant, engine)
    kernels = COMPILED if engine == "compile" else KERNELS[contestant]
    device = work.busy + NODE * kernels
    text += f" + {kernels} kernels {NODE * kernels:.0f} µs"
    triton_kernels = OURS_BY_TRITON if contestant.startswith("fastlora") else 0
    host = HOST * (kernels - triton_kernels) + HOST_TRITON * triton_kernels
    if engine == "compile":
        host = HOST_COMPILED * kernels
    if engine != "graph":
        text += f"; host {host / 1e3:.1f} ms"
    return Expected(device if engine == "graph" else max(device, host), text, 0.0, peak(classes, contestant, engine))
