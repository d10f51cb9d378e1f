"""Several parameters of a host as one: views of one stretch of memory, so that one product serves all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["pack", "packed", "stacked", "unpack"]


def pack(parameters: Sequence[nn.Parameter]) -> None:
    """Make `parameters` (of one dtype, device and width) views of one new tensor, one after another; their values stay.

    Left as they are: parameters already packed, and such as cannot be (of another kind than plain dense ones).
    """
    first = parameters[0]
    alike = all(
        type(p) is nn.Parameter
        and type(p.data) is Tensor
        and p.layout == torch.strided
        and (p.dtype, p.device, p.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        for p in parameters
    )
    if len(parameters) == 1 or not alike or packed(parameters):
        return
    whole = torch.cat([p.data for p in parameters])
    for parameter, view in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
        parameter.data = view


def unpack(parameters: Sequence[nn.Parameter]) -> None:
    """Give each of the parameters memory of its own again."""
    if len(parameters) > 1 and packed(parameters):
        for parameter in parameters:
            parameter.data = parameter.data.clone()


def packed(tensors: Sequence[Tensor]) -> bool:
    """Whether each tensor begins in memory where the one before it ends."""
    if any(type(t.data) is not Tensor or not t.is_contiguous() for t in tensors) or tensors[0].device.type == "meta":
        return False
    storage = tensors[0].untyped_storage().data_ptr()
    return all(
        b.untyped_storage().data_ptr() == storage and b.dtype == a.dtype and b.data_ptr() == a.data_ptr() + a.nbytes
        for a, b in itertools.pairwise(tensors)
    )


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """The rows of all tensors: the one tensor itself, a view where they are `packed`, else a copy."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    # a compiled graph cannot see where its inputs lie, so it must not read past the first one
    if torch.compiler.is_compiling() or not packed(tensors):
        return torch.cat(list(tensors))
    return first.as_strided((sum(len(t) for t in tensors), *first.shape[1:]), first.stride())
