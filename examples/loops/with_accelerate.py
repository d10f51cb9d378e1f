"""fastlora under Accelerate: python examples/loops/with_accelerate.py, or `accelerate launch` with it on several devices."""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator
from digits import Classifier, Digits, arguments
from torch.utils.data import DataLoader

import fastlora


def main() -> None:
    args = arguments()
    accelerator = Accelerator()
    model = Classifier().train()
    optimizer = torch.optim.AdamW(fastlora.lora_parameters(model.clip), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Digits(512), args.batch, shuffle=True))
    for batch in itertools.islice(itertools.cycle(loader), args.steps):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    accelerator.print(f"last loss {loss.item():.3f}")
    if accelerator.is_main_process:
        fastlora.save(accelerator.unwrap_model(model).clip, args.out)


if __name__ == "__main__":
    main()
