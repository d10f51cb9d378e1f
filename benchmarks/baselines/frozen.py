"""The floor: the frozen host forward, and the gradient of the lowest blocks' inputs backward; nothing is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .common import Adapters, Trainee, blocks


class Frozen(Trainee):
    """What any method that adapts every block must do at least, with the host's own encoders (77 tokens a prompt)."""

    name, trains = "frozen", "nothing"

    def install(self, adapters: Adapters) -> None:
        self.entries: dict[str, Tensor] = {}
        for tower, rows in blocks(self.model).items():

            def enter(_: Any, args: tuple[Tensor, ...], tower: str = tower) -> tuple[Tensor, ...]:
                self.entries[tower] = args[0].detach().requires_grad_()
                return (self.entries[tower], *args[1:])

            rows[0].register_forward_pre_hook(enter)

    def step(self, images: Tensor, labels: Tensor) -> None:
        self.loss(images, labels).backward()
        self.entries.clear()

    def gradients(self) -> dict[str, Tensor]:
        return {f"{tower} dx": x.grad for tower, x in self.entries.items() if x.grad is not None}
