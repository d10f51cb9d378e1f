"""Full fine-tuning: every weight of both encoders is trained, no adapter."""

from __future__ import annotations

from torch import Tensor

from .common import Adapters, Trainee, blocks


class FullFineTuning(Trainee):
    """The host as it is, with all its parameters trained."""

    name, trains = "full fine-tuning", "weights"
    cast_once = False  # fp32 master weights

    def install(self, adapters: Adapters) -> None:
        self.model.requires_grad_(True)
        self.model.logit_scale.requires_grad_(False)  # the loss uses 100

    def gradients(self) -> dict[str, Tensor]:
        return packed_gradients(self)


def packed_gradients(trainee: Trainee) -> dict[str, Tensor]:
    """Gradients of the lowest and the highest packed q, k, v weight of each tower: all below and above takes part in them."""
    towers = blocks(trainee.model).items()
    return {f"{tower} dW {i}": rows[i].attn.in_proj_weight.grad for tower, rows in towers for i in (0, len(rows) - 1)}
