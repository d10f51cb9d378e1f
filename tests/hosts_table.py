"""The table of docs/hosts.md: what holds for each host, found by trying it. `python tests/hosts_table.py` writes it.

A column is a function of a host that returns its cell; whoever adds one adds it to COLUMNS. A promise that does not hold is an
exception, so that the table cannot be made.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from fastlora.record import lora_layers
from host_models import HOSTS, Host
from models import randomise_adapters

__all__ = ["COLUMNS", "cells", "sites", "table"]

DOC = Path(__file__).resolve().parent.parent / "docs" / "hosts.md"
START, END = "<!-- hosts table -->", "<!-- end of hosts table -->"
TARGETS = ("q", "k", "v", "o", "fc1", "fc2")


@functools.lru_cache(maxsize=1)
def plain(host: Host) -> Any:
    """The host's model, built once for all columns of its row: columns work on copies."""
    return host.build()


def patched(host: Host, dropout: float = 0.0, std: float = 0.05) -> Any:
    """A patched copy in eval mode, all targets, with random B unless `std` is 0."""
    model = copy.deepcopy(plain(host))
    torch.manual_seed(1)
    fastlora.patch(model, rank=4, dropout=dropout, targets=TARGETS)
    randomise_adapters(model, std)
    return model


def loss(outputs: tuple[Tensor, ...]) -> Tensor:
    """A weighted sum: of normalised features the squares would sum to a constant."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack([(out * torch.randn(out.shape, generator=generator)).sum() for out in outputs]).sum()


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], units: float) -> None:
    """Largest difference at most `units` units of the last place of the largest value."""
    for a, b in zip(ours, theirs, strict=True):
        allowed = units * torch.finfo(b.dtype).eps * b.abs().max()
        assert (a - b).abs().max() <= allowed, f"differs by {(a - b).abs().max():.2e}, allowed {allowed:.2e}"


def sites(host: Host) -> str:
    """How many modules take an adapter in each tower, and what is refused."""
    model = copy.deepcopy(plain(host))
    report = fastlora.patch(model, targets=TARGETS)
    vision = sum(not path.startswith(("text", "transformer.")) and "vision" in towers(model) for path in report.patched)
    counts = [("vision", vision), ("text", len(report.patched) - vision)]
    said = [f"{name} {count}" for name, count in counts if count]
    return ", ".join(said + [f"{path} refused: {why.partition(' has no ')[0]}" for path, why in report.skipped.items()])


def towers(model: nn.Module) -> set[str]:
    from fastlora import hosts

    return {tower.encoder for tower in hosts.towers(model)}


def same_outputs(dtype: torch.dtype) -> Callable[[Host], str]:
    """At B = 0 the patched model gives what the host gives."""

    def check(host: Host) -> str:
        model = copy.deepcopy(plain(host)).to(dtype)
        with torch.no_grad():
            before = host.outputs(model)
            fastlora.patch(model, targets=TARGETS)
            # a packed or fused product sums in another order: a few units of the last place of the largest value
            close(host.outputs(model), before, 16)
        return "yes"

    return check


def gradients(host: Host) -> str:
    """Outputs and gradients are those of scale · B A added to each plain weight, with autograd through it, in fp64."""
    model = patched(host).double()
    ours = host.outputs(model)
    loss(ours).backward()

    reference = copy.deepcopy(plain(host)).double().requires_grad_(False)
    scale = next(layer.spec.scale for _, layer in lora_layers(model))
    leaves: dict[str, Tensor] = {}
    updated: dict[str, Tensor] = {}
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    for path, layer in lora_layers(model):
        if not layer.adapted:
            continue
        a, b = (parameter.detach().clone().requires_grad_() for parameter in layer.adapters())
        leaves |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
        # one matrix per projection; where the host keeps them in one weight, cut for the sum and joined again
        deltas = torch.cat([scale * b_g @ a_g for a_g, b_g in zip(a, b.chunk(len(a)), strict=True)])
        parts = layer.base_weights()
        for part, delta in zip(parts, deltas.split([len(part) for part in parts]), strict=True):
            name = names[part.data_ptr()]
            updated[name] = reference.get_parameter(name) + delta
    theirs = torch.func.functional_call(
        _Run(reference, host), {f"model.{name}": w for name, w in updated.items()}, host.inputs_for(reference)
    )
    close(ours, theirs, 2**20)  # fp64 against fp64 by another path: 1e-10 of the largest value
    loss(theirs).backward()
    parameters = dict(model.named_parameters())
    for name, leaf in leaves.items():
        assert parameters[name].grad is not None and leaf.grad is not None and leaf.grad.abs().max() > 0, name
        close((parameters[name].grad,), (leaf.grad,), 2**24)
    return "yes"


class _Run(nn.Module):
    """What a host's run gives, as a module, so that functional_call can replace weights."""

    def __init__(self, model: nn.Module, host: Host) -> None:
        super().__init__()
        self.model, self.host = model, host

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.host.run(self.model, *inputs)


def keys(host: Host) -> str:
    """Every key of the host's state_dict stays, in order, with its value; a plain checkpoint loads strictly."""
    model, before = patched(host), plain(host).state_dict()
    after = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] not in ("lora_A", "lora_B")}
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    model.load_state_dict(before, strict=True)
    return "yes"


def undone(host: Host) -> str:
    """unpatch gives back modules, values and outputs bit for bit."""
    model = copy.deepcopy(plain(host))
    modules, state = dict(model.named_modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = host.outputs(model)
        fastlora.patch(model, targets=TARGETS)
        randomise_adapters(model)
        fastlora.merge(model)
        fastlora.unpatch(model)
        assert dict(model.named_modules()) == modules
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and len(state) == len(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(host.outputs(model), before, strict=True))
    return "yes"


def merged(host: Host) -> str:
    """The merged model gives what the adapted one gives, and differs from the plain one."""
    model = patched(host)
    with torch.no_grad():
        adapted, bare = host.outputs(model), host.outputs(plain(host))
        fastlora.merge(model)
        close(host.outputs(model), adapted, 256)  # the weights' rounding, once, in fp32
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(adapted, bare, strict=True))
    return "yes"


def saved(host: Host) -> str:
    """An adapter saved and loaded into a fresh model gives the same outputs, bit for bit."""
    model, fresh = patched(host), copy.deepcopy(plain(host))
    with tempfile.TemporaryDirectory() as folder:
        fastlora.save(model, f"{folder}/adapter.safetensors")
        fastlora.load(fresh, f"{folder}/adapter.safetensors")
    fresh.eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(host.outputs(fresh), host.outputs(model), strict=True))
    return "yes"


def exported(host: Host) -> str:
    """Where an adapter goes: the merged checkpoint in the plain host by its own loader; PEFT's format in PEFT itself."""
    model = patched(host)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        adapted = host.outputs(model)
        path = Path(folder) / ("merged" if hasattr(model, "save_pretrained") else "merged.safetensors")
        fastlora.save(model, path, format="merged")
        if path.is_dir():
            other = type(plain(host)).from_pretrained(path)
        else:
            other = copy.deepcopy(plain(host))
            other.load_state_dict(load_file(path))
        close(host.outputs(other.eval()), adapted, 256)
        if not path.is_dir():
            return "merged"
        import peft

        fastlora.save(model, f"{folder}/peft", format="peft")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain(host)), f"{folder}/peft")
        close(host.outputs(theirs.base_model.model.eval()), adapted, 256)
    return "merged, PEFT"


def compiled(host: Host) -> str:
    """torch.compile(fullgraph=True) takes the adapted model; outputs are the same."""
    model = patched(host)
    with torch.no_grad():
        expected = host.outputs(model)
    torch.compiler.reset()
    run = torch.compile(_Run(model, host), fullgraph=True, backend="eager")
    close(run(*host.inputs_for(model)), expected, 64)
    return "yes"


COLUMNS: dict[str, Callable[[Host], str]] = {
    "adapted modules": sites,
    "B=0: fp32": same_outputs(torch.float32),
    "bf16": same_outputs(torch.bfloat16),
    "gradients": gradients,
    "keys": keys,
    "unpatch": undone,
    "merge": merged,
    "save, load": saved,
    "exports": exported,
    "compile": compiled,
}


def cells(host: Host) -> list[str]:
    """The host's line of the table."""
    return [host.family, host.model, *(column(host) for column in COLUMNS.values()), host.source]


def table() -> str:
    """The whole table in Markdown, and with which versions it was made."""
    head = ["family", "model", *COLUMNS, "source"]
    lines = [head, ["---"] * len(head), *map(cells, HOSTS)]
    names = ("torch", "open_clip_torch", "transformers", "timm")
    made = "Made with " + ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + "."
    return "\n".join([f"| {' | '.join(line)} |" for line in lines] + ["", made])


if __name__ == "__main__":
    before, rest = DOC.read_text(encoding="utf-8").split(START)
    DOC.write_text(f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
