"""fastlora under Lightning: python examples/loops/with_lightning.py"""

from __future__ import annotations

import lightning
import torch
from digits import Classifier, Digits, arguments
from torch import Tensor
from torch.utils.data import DataLoader

import fastlora


class Module(lightning.LightningModule):
    """The classifier, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = Classifier()

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.classifier(**batch)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(fastlora.lora_parameters(self.classifier.clip), lr=1e-3)


def main() -> None:
    args = arguments()
    module = Module()
    trainer = lightning.Trainer(
        max_steps=args.steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(Digits(512), args.batch, shuffle=True))
    fastlora.save(module.classifier.clip, args.out)


if __name__ == "__main__":
    main()
