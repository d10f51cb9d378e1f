"""Another person's check: PEFT and textbook LoRA on CLIP as their users write it, with nothing of this harness in it.

    python benchmarks/plain.py --classes 10 --steps 3

PEFT wraps Hugging Face's CLIP by its own `get_peft_model`; the textbook is a class of ten lines put in the place of q, k, v of
the same model. Shapes are ViT-B/32's, weights random, fp32, batch 32, prompts at 77 tokens, rank 2, dropout 0.25, AdamW. Prints
one JSON object a step: {"contestant": …, "seconds": …}; the harness times the same methods on open_clip's model.
"""

import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

WARM_UP = 2  # steps of each that are not counted: they map the pages of its memory, which later steps find there


class LoRALinear(nn.Module):
    """Naive LoRA around a linear layer."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(dropout)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N)."""
        return self.base(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


def clip(tiny: bool) -> CLIPModel:
    """ViT-B/32's shapes (or two narrow blocks) at random weights."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    if tiny:
        text = vision = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
    common = {"hidden_act": "quick_gelu", "projection_dim": 512}
    return CLIPModel(CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=512)).train()


def main() -> None:
    """Time both, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a size that proves nothing but that it runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    batch, rank = 32, 2
    scale = 1.0 / rank**0.5

    config = LoraConfig(
        r=rank, lora_alpha=rank * scale, lora_dropout=0.25, target_modules=["q_proj", "k_proj", "v_proj"]
    )  # fmt: skip
    textbook = clip(options.tiny).requires_grad_(False)
    for module in list(textbook.modules()):
        for name in ("q_proj", "k_proj", "v_proj"):
            if isinstance(linear := getattr(module, name, None), nn.Linear):
                setattr(module, name, LoRALinear(linear, rank, scale, 0.25))
    models = {"PEFT": get_peft_model(clip(options.tiny), config), "textbook": textbook}

    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(options.classes, (batch,))
    tokens = torch.randint(1, 1000, (options.classes, 77))
    tokens[:, -1] = 49407
    optimizers = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=2e-4, fused=True)
        for name, m in models.items()
    }
    for step in range(WARM_UP + options.steps):
        for name, model in models.items():
            start = time.perf_counter()
            out = model(input_ids=tokens, pixel_values=images)
            loss = nn.functional.cross_entropy(100.0 * out.image_embeds @ out.text_embeds.T, labels)
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if step >= WARM_UP:
                print(json.dumps({"contestant": name, "seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
