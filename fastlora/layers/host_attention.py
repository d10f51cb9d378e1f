"""LoRAHostAttention: a host's own attention, whatever its options, with adapters on the projections inside it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .base import LoRALayer
from .packing import pack, stacked, unpack
from .weight import AdaptedRows, plain, rows_of

__all__ = ["LoRAHostAttention"]


class _Projections(TorchFunctionMode):
    """Within: a layer answers F.linear on its own weights, whole or cut into their groups of rows."""

    def __init__(self, layer: LoRAHostAttention, answers: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.answers = layer, answers
        # what stands in for the parameters (functional_call, sharding, replicas) knows of no adapter
        strange = (nn.Parameter, Tensor)
        self.strangers = [(weight, i) for i, weight in enumerate(layer.base_weights()) if type(weight) in strange]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return self.layer._answer(self.answers, *args, **(kwargs or {}))
        if self.strangers and args and isinstance(args[0], Tensor):
            args = (self._known(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))

    def _known(self, tensor: Tensor) -> Tensor:
        for weight, i in self.strangers:
            if tensor is weight:
                return rows_of(weight, self.layer, i * weight.shape[0])
        return tensor


class LoRAHostAttention(LoRALayer):
    """Base of drop-ins whose `forward` is the host's own; only F.linear on q, k, v is computed with adapters.

    The host may hold q, k, v in one weight or in three. Three are packed: they become views of one tensor, so that one
    product serves q, k and v of the same input, while the host's parameters, their names and their values stay.
    """

    _host: type[nn.Module]
    _weights: tuple[str, ...]

    def base_weights(self) -> tuple[Tensor, ...]:
        return tuple(_fetch(self, name) for name in self._weights)

    def _settle(self) -> None:
        for parameters in self._packs():
            pack(parameters)
        super()._settle()

    def _release(self) -> None:
        super()._release()
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
        cut = isinstance(weight, AdaptedRows) and weight._layer() is self
        if group is None and not cut:
            return F.linear(input, weight, bias)
        answers["used"] = True
        if group is None or len(weights) == 1 or bias is not self._bias_of(group):
            first = weight._first if isinstance(weight, AdaptedRows) else (group or 0) * weight.shape[0]
            groups = self.groups_of(first, weight.shape[0])
            # of no whole groups nobody knows the adapter, and the weight says so
            return F.linear(input, weight, bias) if groups is None else self._project(input, bias, None, None, groups)
        if answers.get("input") is not input:  # q, k and v of one input come from one product
            answers["input"], answers["qkv"] = input, self._project(input, self._bias(), None, None).chunk(len(weights), -1)
        return answers["qkv"][group]

    def _bias(self) -> Tensor | None:
        """The biases of separate projections, stacked; zeros where only some have one."""
        biases = self._biases()
        if all(bias is None for bias in biases):
            return None
        like = plain(self.base_weights()[0])
        return stacked([like.new_zeros(len(like)) if bias is None else bias for bias in biases])

    def _biases(self) -> list[Tensor | None]:
        return [self._bias_of(group) for group in range(len(self._weights))]

    def _bias_of(self, group: int) -> Tensor | None:
        return _fetch(self, self._weights[group].removesuffix("weight") + "bias")

    def _packs(self) -> list[list[nn.Parameter]]:
        """Parameters that belong side by side: weights, and biases where all projections have one."""
        if len(self._weights) == 1:
            return []
        biases = [bias for bias in self._biases() if bias is not None]
        packs = [list(self.base_weights())] + ([biases] if len(biases) == len(self._weights) else [])
        return packs  # type: ignore[return-value]

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
