"""fastlora in a loop of your own: python examples/loops/plain_torch.py"""

from __future__ import annotations

import itertools

import torch
from digits import Classifier, Digits, arguments
from torch.utils.data import DataLoader

import fastlora


def main() -> None:
    args = arguments()
    model = Classifier().train()
    optimizer = torch.optim.AdamW(fastlora.lora_parameters(model.clip), lr=1e-3)
    batches = itertools.cycle(DataLoader(Digits(512), args.batch, shuffle=True))
    for step, batch in enumerate(itertools.islice(batches, args.steps)):
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    fastlora.save(model.clip, args.out)


if __name__ == "__main__":
    main()
