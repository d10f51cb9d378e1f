"""LoRAHostAttention: a host's own attention, whatever its options, with adapters on the projections inside it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import LoRALayer
from .packing import pack, stacked, unpack

__all__ = ["LoRAHostAttention"]


class _Projections(TorchFunctionMode):
    """Within: F.linear on a layer's own weights is answered by that layer."""

    def __init__(self, layer: LoRAHostAttention, answers: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.answers = layer, answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self.layer._answer(self.answers, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class LoRAHostAttention(LoRALayer):
    """Base of drop-ins whose `forward` is the host's own; only F.linear on q, k, v is computed with adapters.

    The host may hold q, k, v in one weight or in three. Three are packed: they become views of one tensor, so that one
    product serves q, k and v of the same input, while the host's parameters, their names and their values stay.
    """

    _host: type[nn.Module]
    _weights: tuple[str, ...]

    def base_weights(self) -> tuple[Tensor, ...]:
        return tuple(_fetch(self, name) for name in self._weights)

    def _attach(self, site: int, groups: int) -> None:
        self._pack()
        super()._attach(site, groups)
        self.register_load_state_dict_post_hook(_pack_again)

    def _release(self) -> None:
        for parameters in self._packs():
            unpack(parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward.

        Raises:
            RuntimeError: the host did not compute its projections by F.linear on the weights known here.
        """
        answers: dict[str, Any] = {}
        with _Projections(self, answers):
            out = super().forward(*args, **kwargs)
        if len(answers) == 0:
            raise RuntimeError(
                f"{type(self).__name__} did not use {', '.join(self._weights)} as a linear projection, so that its adapter"
                " would have been passed over: this version of the host is not supported"
            )
        return out

    def _answer(self, answers: dict[str, Any], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = self.base_weights()
        group = next((i for i, own in enumerate(weights) if own is weight), None)
        if group is None:
            return F.linear(input, weight, bias)
        if len(weights) == 1:
            answers["input"] = input
            return self._project(input, bias, None, None)
        if answers.get("input") is not input:  # q, k and v of one input come from one product
            answers["input"], answers["qkv"] = input, self._project(input, self._bias(), None, None).chunk(len(weights), -1)
        return answers["qkv"][group]

    def _bias(self) -> Tensor | None:
        """The biases of separate projections, stacked; zeros where only some have one."""
        biases = self._biases()
        if all(bias is None for bias in biases):
            return None
        width = len(self.base_weights()[0])
        like = self.base_weights()[0]
        return stacked([like.new_zeros(width) if bias is None else bias for bias in biases])

    def _biases(self) -> list[Tensor | None]:
        return [_fetch(self, name.removesuffix("weight") + "bias") for name in self._weights]

    def _packs(self) -> list[list[nn.Parameter]]:
        """Parameters that belong side by side: weights, and biases where all projections have one."""
        if len(self._weights) == 1:
            return []
        biases = [bias for bias in self._biases() if bias is not None]
        packs = [list(self.base_weights())] + ([biases] if len(biases) == len(self._weights) else [])
        return packs  # type: ignore[return-value]

    def _pack(self) -> None:
        for parameters in self._packs():
            pack(parameters)

    # What moves, copies or replaces parameters one by one takes them apart.
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made at run time: a copy or a pickle names the host's class, which can be imported
        return _blank, (self._host,), self.__dict__.copy()


_CLASSES: dict[type[nn.Module], type[LoRAHostAttention]] = {}


def class_for(host: type[nn.Module]) -> type[LoRAHostAttention]:
    """The drop-in class of a host's class, which it also is a subclass of; one for each host's class."""
    if host not in _CLASSES:
        _CLASSES[host] = type(f"LoRA{host.__name__}", (LoRAHostAttention, host), {"__module__": __name__, "_host": host})
    return _CLASSES[host]


def _blank(host: type[nn.Module]) -> LoRAHostAttention:
    cls = class_for(host)
    return cls.__new__(cls)


def _fetch(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _pack_again(module: nn.Module, _: Any) -> None:
    assert isinstance(module, LoRAHostAttention)
    module._pack()
