"""Any torch model: its Linears and MultiheadAttentions chosen by name patterns."""

from __future__ import annotations

import fnmatch

from torch import nn

from .sites import QKV, Site

__all__ = ["sites"]

_PACKED = ":qkv"


def sites(model: nn.Module, patterns: tuple[str, ...]) -> tuple[dict[int, tuple[Site, ...]], dict[str, str]]:
    """Position among the model's modules -> sites of each module whose path matches a pattern; path -> why it is left alone.

    Args:
        patterns: as `LoRAConfig.modules`.

    Raises:
        ValueError: a pattern that matches no nn.Linear and no nn.MultiheadAttention.
    """
    found: dict[int, tuple[Site, ...]] = {}
    skipped: dict[str, str] = {}
    unused = set(patterns)
    modules = dict(model.named_modules())
    for position, (path, module) in enumerate(modules.items()):
        if not isinstance(module, (nn.Linear, nn.MultiheadAttention)):
            continue
        matching = [p for p in patterns if path and fnmatch.fnmatchcase(path, p.removesuffix(_PACKED))]
        if not matching:
            continue
        unused -= set(matching)
        around = modules[path.rpartition(".")[0]]
        if isinstance(around, nn.TransformerEncoderLayer):
            skipped[path] = "nn.TransformerEncoderLayer reads its weights without calling it where gradients are off"
        elif isinstance(module, nn.MultiheadAttention):
            # what a pattern names is wanted: q, k, v and o as `targets` says
            found[position] = (Site(path, QKV, carries=("o",)), Site(f"{path}.out_proj", ("o",)))
        elif isinstance(around, nn.MultiheadAttention):
            skipped[path] = "nn.MultiheadAttention reads its weights without calling it: name the attention, with target o"
        elif not any(p.endswith(_PACKED) for p in matching):
            found[position] = (Site(path, ()),)
        elif module.out_features % len(QKV):
            skipped[path] = f"its {module.out_features} rows are not q, k and v of one width"
        else:
            found[position] = (Site(path, QKV),)
    if unused:
        raise ValueError(f"no nn.Linear and no nn.MultiheadAttention matches {sorted(unused)[0]!r}")
    # an out_proj that a pattern names beside its attention is that attention's
    covered = {site.path for group in found.values() for site in group}
    return found, {path: why for path, why in skipped.items() if path not in covered}
