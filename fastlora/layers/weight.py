"""A frozen weight that knows its adapter: whoever projects with it gets the adapter's update too, or an error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import LoRALayer

__all__ = ["AdaptedRows", "AdaptedWeight", "guard", "plain", "rows_of", "unguard"]


def _functions(*names: str) -> set[Any]:
    """torch's functions and tensor methods of these names."""
    return {getattr(place, name) for place in (torch, Tensor, F, torch.linalg) for name in names if hasattr(place, name)}


# What multiplies activations by a weight.
_PRODUCTS = _functions(
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger",
    "kron", "tensordot", "einsum", "chain_matmul", "addmm", "addmm_", "addmv", "addmv_", "addbmm", "addbmm_", "baddbmm",
    "baddbmm_", "multi_dot", "vecdot", "cdist", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)  # fmt: skip
# What gives consecutive rows, in order.
_CUTS = _functions("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split", "tensor_split")
# What else gives several tensors of which each may serve as a weight.
_PARTS = _CUTS | _functions("unbind", "hsplit", "vsplit", "dsplit", "broadcast_tensors")
# What gives the frozen values as they are, or nothing of them. view_as is how `plain` takes them, in graphs of torch.compile
# too, which some backends run on the adapted tensors.
_PLAIN = (
    _functions("view_as", "detach", "detach_", "embedding", "embedding_bag")
    | _functions(*(name for name in dir(torch) if name.endswith("_like")))
    | _functions(*(name for name in dir(Tensor) if name.startswith("new")))
    | {Tensor.data.__get__, Tensor.grad.__get__, Tensor._base.__get__}  # type: ignore[attr-defined, union-attr]
)
# What compiled graphs call.
_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class _Adapted:
    """How a tensor with an adapter answers torch's functions.

    F.linear on it is the adapted layer's own projection, and so is F.linear on whole groups of its rows. Any other product
    with it, or with what was computed from it, is an error while the adapter computes. All else gives what it always gives:
    metadata, gradients, changes in place, `.data` and `.detach()`, which are the frozen weight itself.
    """

    _layer: weakref.ref[LoRALayer]
    _first: int | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            return _product(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        # else it is a number, a size, named results, many tensors at once, what was changed in place, or a compiled graph
        if (type(out) is Tensor and not isinstance(func, _OPS) and func not in _PLAIN) or func in _PARTS:
            return _derived(func, args, kwargs, out)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        # a copy is plain, until the copy of its layer takes it up
        memo[id(self)] = copy = _twin(self).__deepcopy__({})
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _twin(self).__reduce_ex__(protocol)


class AdaptedWeight(_Adapted, nn.Parameter):
    """A host's parameter while it has an adapter: the same object, another class."""


class AdaptedRows(_Adapted, Tensor):
    """What was computed from an AdaptedWeight: rows of it, from `_first` on, or something else, where that is None."""


def guard(weights: Sequence[Tensor], layer: LoRALayer) -> None:
    """Make the parameters `weights`, which stacked are the layer's weight, know its adapter.

    Left as they are: tensors of another kind than plain parameters, such as sharded ones.
    """
    first = 0
    for weight in weights:
        if type(weight) is nn.Parameter:
            weight.__class__ = AdaptedWeight
            weight._layer, weight._first = weakref.ref(layer), first  # type: ignore[attr-defined]
        first += len(weight)


def unguard(weights: Sequence[Tensor]) -> None:
    """Make them plain parameters again."""
    for weight in weights:
        if type(weight) is AdaptedWeight:
            weight.__class__ = nn.Parameter  # type: ignore[assignment]
            del weight._layer, weight._first


def rows_of(weight: Tensor, layer: LoRALayer, first: int | None) -> Tensor:
    """An alias of `weight` that is known as rows of the layer's weight, from `first` on; of other origin where it is None."""
    rows = plain(weight).as_subclass(AdaptedRows)
    rows._layer, rows._first = weakref.ref(layer), first
    return rows


def plain(weight: Tensor) -> Tensor:
    """The tensor without its knowledge of an adapter: an alias that computes as any other."""
    if type(weight) not in (AdaptedWeight, AdaptedRows):
        return weight
    with torch._C.DisableTorchFunctionSubclass():
        return weight.view_as(weight)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The product as the adapted layer gives it; RuntimeError where it cannot and an adapter computes."""
    found = _adapted_among((args, kwargs))
    layers = [layer for tensor in found if (layer := _layer_of(tensor)) is not None]
    if layers and (answer := layers[0].answer(func, args, kwargs)) is not None:
        return answer
    for layer in layers:
        if layer.adapted and not layer.merged:
            raise RuntimeError(
                f"{func.__name__} takes the weight of a {type(layer).__name__} past its adapter, which would not count: call"
                " the module, or F.linear on its weight, whole or cut into q, k and v; or call fastlora.merge(model) first."
                " Where the frozen weight is meant, take .detach() of it"
            )
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _layer_of(tensor: Any) -> LoRALayer | None:
    link = getattr(tensor, "_layer", None)
    return None if link is None else link()


def _adapted_among(value: Any) -> list[Any]:
    """Every adapted tensor in nested arguments."""
    if isinstance(value, _Adapted):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [found for item in value for found in _adapted_among(item)] if isinstance(value, (tuple, list)) else []


def _derived(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """`out` of a function on an adapted tensor, with whatever may serve as a weight still known."""
    parts = [out] if isinstance(out, Tensor) else out
    source = _adapted_among((args, kwargs))[0]
    if (layer := _layer_of(source)) is None:
        return out
    first = source._first
    if func is Tensor.__getitem__ or func is Tensor.narrow:
        first = None if first is None else _start(func, args, source, first)
    elif func not in _CUTS or any(part.shape[1:] != plain(source).shape[1:] for part in parts):
        first = None
    known = []
    for part in parts:
        known.append(_known(part, layer, first) if isinstance(part, Tensor) else part)
        first = first + part.shape[0] if first is not None else None
    return known[0] if isinstance(out, Tensor) else type(out)(known)


def _known(out: Tensor, layer: LoRALayer, first: int | None) -> Tensor:
    # of fewer dimensions it is a statistic; of another type it is a target of something in place
    return rows_of(out, layer, first) if type(out) is Tensor and out.ndim > 1 and out.is_floating_point() else out


def _start(func: Any, args: tuple[Any, ...], source: Any, first: int) -> int | None:
    """Where the rows of the result begin, if they are consecutive rows of `source`; else None."""
    if func is Tensor.narrow:
        return first + args[2] if len(args) == 4 and args[1] == 0 else None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    whole = len(index) == 1 or (len(index) == 2 and (index[1] is Ellipsis or index[1] == slice(None)))
    if not whole or not isinstance(index[0], slice):
        return None
    start, _, step = index[0].indices(plain(source).shape[0])
    return first + start if step == 1 else None


def _twin(tensor: Any) -> Any:
    """A plain parameter or tensor on the same memory."""
    if not isinstance(tensor, AdaptedWeight):
        return plain(tensor).detach()
    return nn.Parameter(tensor.detach(), tensor.requires_grad)
