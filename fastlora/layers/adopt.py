"""From a host's module to its drop-in and back."""

from __future__ import annotations

import collections
from collections.abc import Container

from torch import Tensor, nn

from ..config import LoRAConfig
from .attention import LoRAMultiheadAttention
from .base import DEFAULT, LoRALayer
from .host_attention import LoRAHostAttention, class_for
from .linear import LoRALinear

__all__ = ["adopt", "refusal", "release", "tied"]


def tied(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules of `model` hold."""
    held = [id(parameter) for module in model.modules() for parameter in module._parameters.values() if parameter is not None]
    return {number for number, count in collections.Counter(held).items() if count > 1}


def refusal(host: nn.Module, weights: tuple[str, ...] = (), tied: Container[int] = ()) -> str | None:
    """Why `host` cannot be adapted, or None. `tied`: ids of parameters that are others' too; else arguments as for `adopt`."""
    if isinstance(host, LoRALayer):
        return "it has an adapter already"
    kind = type(host)
    if weights:
        found = [_parameter(host, name) for name in weights]
        if any(weight is None for weight in found):
            return f"{kind.__name__} has no parameters {', '.join(weights)}"
        if len({(w.shape, w.dtype) for w in found if w is not None}) > 1:
            return f"{', '.join(weights)} differ in shape or dtype"
    elif isinstance(host, nn.MultiheadAttention):
        if kind.forward is not nn.MultiheadAttention.forward:
            return f"{kind.__name__} has a forward of its own"
        if not host._qkv_same_embed_dim:
            return "its keys or values have a width of their own (kdim, vdim)"
        if host.bias_k is not None or host.add_zero_attn:
            return "it adds a bias or zeros to keys and values (add_bias_kv, add_zero_attn)"
        found = [_parameter(host, "in_proj_weight")]
    elif isinstance(host, nn.Linear):
        if kind.forward is not nn.Linear.forward:
            return f"{kind.__name__} has a forward of its own"
        found = [_parameter(host, "weight")]
    else:
        return f"it is a {kind.__name__}, not a Linear or MultiheadAttention"
    if any(weight is None or not weight.is_floating_point() for weight in found):
        return f"{kind.__name__} holds no plain floating-point weight (quantised or parametrised?)"
    if any(id(weight) in tied for weight in found):
        return "its weight is another module's too, which would change with it"
    return None


def adopt(
    host: nn.Module,
    config: LoRAConfig,
    *,
    site: int,
    active: tuple[bool, ...],
    weights: tuple[str, ...] = (),
    name: str = DEFAULT,
) -> LoRALayer:
    """A drop-in for `host` that shares its parameters, buffers, submodules and hooks; `host` is left as it is.

    Args:
        host: nn.Linear, nn.MultiheadAttention, or with `weights` any attention; `refusal` is None for it.
        site: which layer this is; keys the dropout mask.
        active: for each group of the weight's rows whether it gets an adapter.
        weights: names of the parameters that hold q, k, v (all in one, or one each), which the host's own forward gives to
            F.linear.
        name: of the adapter, which is active.

    Raises:
        ValueError: the rank is above the smaller side of a group's weight.
    """
    cls: type[LoRALayer] = LoRAMultiheadAttention if isinstance(host, nn.MultiheadAttention) else LoRALinear
    cls = class_for(type(host)) if weights else cls
    layer = cls.__new__(cls)
    layer.__dict__.update(host.__dict__)
    for registry in (
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_load_state_dict_post_hooks",
        "_state_dict_hooks",
    ):
        layer.__dict__[registry] = host.__dict__[registry].copy()
    if isinstance(layer, LoRAHostAttention):
        layer._weights = weights
    layer._attach(site, len(active))
    layer.check_rank(config.rank)
    layer.add(name, config, active)
    layer.activate(name)
    return layer


def release(layer: LoRALayer, host: nn.Module) -> None:
    """Hand the layer's present parameters, buffers and mode back to `host`, which may have been left behind by a swap."""
    layer._release()
    for registry in ("_parameters", "_buffers"):
        ours, theirs = layer.__dict__[registry], host.__dict__[registry]
        theirs.update({name: ours[name] for name in theirs})
    host.train(layer.training)


def _parameter(host: nn.Module, path: str) -> Tensor | None:
    """The parameter at `path` of `host`, or None where there is none, or a computed one."""
    try:
        return host.get_parameter(path)
    except AttributeError:
        return None
