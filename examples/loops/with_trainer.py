"""fastlora under Hugging Face's Trainer: python examples/loops/with_trainer.py"""

from __future__ import annotations

import tempfile

from digits import Classifier, Digits, arguments
from transformers import Trainer, TrainingArguments

import fastlora


def main() -> None:
    args = arguments()
    model = Classifier()
    with tempfile.TemporaryDirectory() as folder:  # of the Trainer's own checkpoints, of which we want none
        settings = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-3, save_strategy="no",
            logging_steps=max(1, args.steps // 10), report_to=[], disable_tqdm=True,
        )  # fmt: skip
        # the Trainer trains what requires a gradient: after fastlora.patch, the adapters
        Trainer(model, settings, train_dataset=Digits(512)).train()
    fastlora.save(model.clip, args.out)


if __name__ == "__main__":
    main()
