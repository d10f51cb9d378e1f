"""Files that are broken, hostile or for something else, in every format: one clear error each, the model untouched."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import pkgutil
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from models import randomise_adapters, tiny

RAN: list[str] = []


class Bomb:
    """What a hostile pickle does when it is opened by one who trusts it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return RAN.append, ("code in a file was run",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good adapter in each format: native.safetensors, peft/, paper.pt."""
    folder = tmp_path_factory.mktemp("good")
    model = tiny()
    fastlora.patch(model)
    randomise_adapters(model)
    for name, form in (("native.safetensors", "fastlora"), ("peft", "peft"), ("paper.pt", "clip-lora")):
        fastlora.save(model, folder / name, format=form)  # type: ignore[arg-type]
    return folder


def tensors(change: Callable[[dict[str, Any], str], Any]) -> Callable[[Path], None]:
    """Change the tensors of a PEFT folder; `change` gets them and the first name."""

    def damage(path: Path) -> None:
        found = load_file(path / "adapter_model.safetensors")
        change(found, sorted(found)[0])
        save_file(found, path / "adapter_model.safetensors")

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    """Change values of a PEFT folder's adapter_config.json."""

    def damage(path: Path) -> None:
        values = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(values | changes))

    return damage


def paper(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what a lora_weights.pt holds."""

    def damage(path: Path) -> None:
        values = torch.load(path, weights_only=True)
        change(values)
        torch.save(values, path)

    return damage


def native(change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the tensors and the metadata of fastlora's own file; `change` gets both."""

    def damage(path: Path) -> None:
        found = load_file(path)
        with safe_open(path, "pt") as file:
            values = json.loads(file.metadata()["fastlora"])
        change(found, values)
        save_file(found, path, {"fastlora": json.dumps(values)})

    return damage


def native_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    """Change the text of the metadata of fastlora's own file."""

    def damage(path: Path) -> None:
        with safe_open(path, "pt") as file:
            text = file.metadata()["fastlora"]
        save_file(load_file(path), path, {"fastlora": change(text)})

    return damage


def base(change: Callable[[list[float]], Any]) -> Callable[[Path], None]:
    """Change the first fingerprint of fastlora's own file."""
    return native(lambda _, values: values["base"].update({min(values["base"]): change(values["base"][min(values["base"])])}))


def float8(path: Path) -> None:
    """All tensors in 8 bits; by hand, as safetensors writes those of a shape it knows."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, at = json.loads(data[8 : 8 + size]), 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = torch.Size(entry["shape"]).numel()
            header[name] = {"dtype": "F8_E4M3", "shape": entry["shape"], "data_offsets": [at, at + count]}
            at += count
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


def pair(change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    """Change one A of a lora_weights.pt."""

    def damage(values: dict[str, Any]) -> None:
        projection = values["weights"]["layer_0"]["q_proj"]
        projection["w_lora_A"] = change(projection["w_lora_A"])

    return paper(damage)


def first(change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    """Change the first of some tensors by name."""
    return lambda found: found | {min(found): change(found[min(found)])}


DIGITS = "1" + 400 * "0"


def truncate(path: Path) -> None:
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    path.write_bytes(path.read_bytes()[:-200])


def index_outside(path: Path) -> None:
    """A folder whose index names a file elsewhere."""
    os.replace(path / "adapter_model.safetensors", path.parent / "secret.safetensors")
    index = {"weight_map": {name: "../secret.safetensors" for name in load_file(path.parent / "secret.safetensors")}}
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


def old_weights(make: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """adapter_model.bin, a pickle, in the place of safetensors."""

    def damage(path: Path) -> None:
        found = load_file(path / "adapter_model.safetensors")
        (path / "adapter_model.safetensors").unlink()
        torch.save(make(found), path / "adapter_model.bin")

    return damage


def many(path: Path) -> None:
    """100,000 more keys, of tensors without elements; by hand, as safetensors takes its time to write so many."""
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + size]), len(data) - 8 - size
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(header | {f"base_model.model.x{i}.lora_A.weight": empty for i in range(100_000)}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def put(found: dict[str, Any], values: dict[str, Any], name: str, tensor: torch.Tensor) -> None:
    """Add to fastlora's own file what claims to have been trained beside the adapter."""
    found[name] = tensor
    values["beside"] = {name: True}


def set_nan(pair: dict[str, Any]) -> None:
    pair["w_lora_B"][0, 0] = float("nan")


CASES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "native-base-nan": ("native.safetensors", base(lambda v: [float("nan")] * len(v)), "is not of finite numbers"),
    "native-base-inf": ("native.safetensors", base(lambda v: [*v[:-1], float("inf")]), "is not of finite numbers"),
    "native-base-empty": ("native.safetensors", base(lambda v: []), "is not of finite numbers"),
    "native-base-text": ("native.safetensors", base(lambda v: ["1.0"] * len(v)), "is not of finite numbers"),
    "native-base-number": ("native.safetensors", base(lambda v: 1.0), "is not of finite numbers"),
    "native-base-short": ("native.safetensors", base(lambda v: v[:-1]), "other base weights"),
    "native-base-of-nothing": ("native.safetensors", native(lambda _, v: v["base"].clear()), "fingerprint of the base and its"),
    "native-base-of-more": ("native.safetensors", native(lambda _, v: v["base"].update(nowhere=[1.0])), "differ on nowhere"),
    "native-base-list": ("native.safetensors", native(lambda _, v: v.update(base=[1.0])), "AttributeError"),
    "native-float8": ("native.safetensors", float8, "is a tensor of float8_e4m3fn"),
    "native-int": ("native.safetensors", native(lambda t, _: t.update(first(Tensor.int)(t))), "is a tensor of int32"),
    "native-bool": ("native.safetensors", native(lambda t, _: t.update(first(Tensor.bool)(t))), "is a tensor of bool"),
    "native-complex": (
        "native.safetensors",
        native(lambda t, _: t.update(first(lambda a: a.to(torch.complex64))(t))),
        "is a tensor of complex64",
    ),
    "native-too-large": (
        "native.safetensors",
        native(lambda t, _: t.update(first(lambda a: a.double() + 1e300)(t))),
        "holds NaN or infinite",
    ),
    "native-nested": ("native.safetensors", native_text(lambda _: "[" * 100_000), "RecursionError"),
    "native-400-digits": (
        "native.safetensors",
        native_text(lambda t: t.replace('"alpha": 1.0', f'"alpha": {DIGITS}')),
        "OverflowError",
    ),
    "native-5000-digits": (
        "native.safetensors",
        native_text(lambda t: t.replace('"rank": 2', f'"rank": {DIGITS * 20}')),
        "not a readable safetensors adapter: Exceeds the limit",
    ),
    "native-name-of-lines": (
        "native.safetensors",
        native(lambda t, _: t.update({"a\nb" * 5000: torch.zeros(1)})),
        r"it holds a\?b.*have no place here",
    ),
    "native-beside-missing": ("native.safetensors", native(lambda _, v: v.update(beside={"ln_final.bias": True})), "it lacks"),
    "native-beside-text": ("native.safetensors", native(lambda _, v: v.update(beside="ln_final.bias")), "AttributeError"),
    "native-beside-nowhere": ("native.safetensors", native(lambda t, v: put(t, v, "head", torch.ones(3))), "has no head"),
    "native-beside-shape": (
        "native.safetensors",
        native(lambda t, v: put(t, v, "ln_final.bias", torch.ones(3))),
        r"ln_final.bias, trained beside the adapter, is \(3,\), here \(48,\)",
    ),
    "native-beside-nan": (
        "native.safetensors",
        native(lambda t, v: put(t, v, "logit_scale", torch.tensor(float("nan")))),
        "logit_scale holds NaN",
    ),
    "native-beside-int": (
        "native.safetensors",
        native(lambda t, v: put(t, v, "ln_final.bias", torch.ones(48).int())),
        "ln_final.bias is a tensor of int32",
    ),
    "native-100000-keys": ("native.safetensors", many, "100000 tensors have no place here"),
    "native-pickle-with-code": ("native.safetensors", lambda p: p.write_bytes(pickle.dumps(Bomb())), "not a readable"),
    "peft-truncated": ("peft", truncate, "not a readable PEFT adapter"),
    "peft-no-weights": ("peft", lambda p: (p / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors or"),
    "peft-no-config": ("peft", lambda p: (p / "adapter_config.json").unlink(), "folder without adapter_config.json"),
    "peft-config-no-json": ("peft", lambda p: (p / "adapter_config.json").write_text("{"), "not a readable PEFT config"),
    "peft-config-list": ("peft", lambda p: (p / "adapter_config.json").write_text("[]"), "not a readable PEFT config"),
    "peft-rank-text": ("peft", config(r="2"), "'2' is no number"),
    "peft-rank-0": ("peft", config(r=0), "the config says rank 0"),
    "peft-alpha-nan": ("peft", config(lora_alpha=float("nan")), "alpha must be a positive number"),
    "peft-dora": ("peft", config(use_dora=True), "use_dora = True is not plain LoRA"),
    "peft-pissa": ("peft", config(init_lora_weights="pissa"), "changes the base"),
    "peft-saved-modules": ("peft", config(modules_to_save=["visual_projection"]), "modules_to_save"),
    "peft-method": ("peft", config(peft_type="IA3"), "peft_type is IA3"),
    "peft-bad-pattern": ("peft", config(rank_pattern={"(": 2}), "not a readable PEFT config"),
    "peft-nan": ("peft", tensors(lambda t, n: t[n].fill_(float("nan"))), "holds NaN"),
    "peft-missing": ("peft", tensors(lambda t, n: t.pop(n)), "lacks base_model.model.text_model"),
    "peft-rank": ("peft", tensors(lambda t, n: t.update({n: t[n][:1].clone()})), "the config says rank 2"),
    "peft-width": ("peft", tensors(lambda t, n: t.update({n: t[n][:, 1:].clone()})), r"A \(2, 47\)"),
    "peft-vector": ("peft", tensors(lambda t, n: t.update({n: t[n][0].clone()})), "is damaged"),
    "peft-extra": ("peft", tensors(lambda t, n: t.update(other=torch.zeros(2))), "holds other, which is not part of a LoRA"),
    "peft-block": (
        "peft",
        tensors(lambda t, n: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items()})),
        r"adapts text_model\.encoder\.layers\.9\.self_attn\.k_proj, which this one does not have",
    ),
    "peft-other-model": (
        "peft",
        tensors(lambda t, n: t.update({"base_model.model.model.layers.0.q.lora_A.weight": t[n].clone()})),
        "is damaged: it holds base_model.model.model.layers.0.q.lora_A.weight and lacks",
    ),
    "peft-100000-keys": ("peft", many, "is damaged: it holds"),
    "peft-outside": ("peft", index_outside, "no adapter_model.safetensors or adapter_model.bin beside it"),
    "peft-bin-with-code": ("peft", old_weights(lambda t: t | {"x": Bomb()}), "holds more than tensors and plain values"),
    "peft-bin-no-tensors": ("peft", old_weights(lambda t: {"x": 1}), "more than tensors by name"),
    "peft-config-nested": ("peft", lambda p: (p / "adapter_config.json").write_text("[" * 100_000), "RecursionError"),
    "peft-400-digits": ("peft", config(lora_alpha=int(DIGITS)), "OverflowError"),
    "peft-modules-number": ("peft", config(modules_to_save=[3]), "no list of names"),
    "peft-int": ("peft", tensors(lambda t, n: t.update({n: t[n].int()})), "is a tensor of int32"),
    "peft-bin-sparse": ("peft", old_weights(first(Tensor.to_sparse)), "is a tensor of layout sparse_coo"),
    "peft-bin-meta": ("peft", old_weights(first(lambda a: a.to("meta"))), "is a tensor without values"),
    "peft-bin-huge": ("peft", old_weights(first(lambda a: a[:, :1].expand(2, 10**12))), "for another model"),
    "paper-sparse": ("paper.pt", pair(Tensor.to_sparse), "layer_0 q_proj w_lora_A is a tensor of layout sparse_coo"),
    "paper-meta": ("paper.pt", pair(lambda a: a.to("meta")), "is a tensor without values"),
    "paper-int": ("paper.pt", pair(Tensor.long), "is a tensor of int64"),
    "paper-complex": ("paper.pt", pair(lambda a: a + 0j), "is a tensor of complex64"),
    "paper-float8": ("paper.pt", pair(lambda a: a.to(torch.float8_e4m3fn)), "is a tensor of float8_e4m3fn"),
    "paper-number": ("paper.pt", pair(lambda a: 1.0), "is a float"),
    "paper-huge": ("paper.pt", pair(lambda a: a[:, :1].expand(2, 10**12)), "for another model"),
    "paper-too-large": ("paper.pt", pair(lambda a: a.double() + 1e300), "holds NaN or infinite"),
    "paper-400-digits": ("paper.pt", paper(lambda v: v["metadata"].update(alpha=int(DIGITS))), "OverflowError"),
    "paper-truncated": ("paper.pt", truncate, "not a readable lora_weights.pt"),
    "paper-with-code": ("paper.pt", lambda p: torch.save({"weights": Bomb(), "metadata": {}}, p), "holds more than tensors"),
    "paper-bare-pickle": ("paper.pt", lambda p: p.write_bytes(pickle.dumps(Bomb())), "holds more than tensors"),
    "paper-bare-opcodes": ("paper.pt", lambda p: p.write_bytes(b"\x80\x02\x95\xff\xff"), "not a readable lora_weights.pt"),
    "paper-list": ("paper.pt", lambda p: torch.save([1, 2], p), "is no lora_weights.pt"),
    "paper-no-metadata": ("paper.pt", paper(lambda v: v.pop("metadata")), "is no lora_weights.pt of CLIP-LoRA: KeyError"),
    "paper-rank-0": ("paper.pt", paper(lambda v: v["metadata"].update(r=0)), "rank must be"),
    "paper-rank-3": ("paper.pt", paper(lambda v: v["metadata"].update(r=3)), "the metadata says rank 3"),
    "paper-alpha": ("paper.pt", paper(lambda v: v["metadata"].update(alpha=None)), "is no lora_weights.pt"),
    "paper-encoder": ("paper.pt", paper(lambda v: v["metadata"].update(encoder="audio")), "unknown encoder 'audio'"),
    "paper-position": ("paper.pt", paper(lambda v: v["metadata"].update(position="top")), "unknown layers 'top'"),
    "paper-params": ("paper.pt", paper(lambda v: v["metadata"].update(params=["q"])), r"layer_0 holds \['k_proj'"),
    "paper-layers": ("paper.pt", paper(lambda v: v["weights"].pop("layer_5")), "5 layers, here 3 of text and 3 of vision"),
    "paper-renamed": (
        "paper.pt",
        paper(lambda v: v["weights"].update(layer_x=v["weights"].pop("layer_2"))),
        "is no lora_weights.pt of CLIP-LoRA: KeyError",
    ),
    "paper-width": (
        "paper.pt",
        paper(lambda v: v["weights"].update(layer_0=v["weights"]["layer_3"])),
        r"layer_0 \w+ has A \(2, 64\)",
    ),
    "paper-nan": ("paper.pt", paper(lambda v: set_nan(v["weights"]["layer_0"]["q_proj"])), "holds NaN"),
    "paper-100000-layers": (
        "paper.pt",
        paper(lambda v: v["weights"].update({f"layer_{i}": {} for i in range(6, 100_000)})),
        "it has 100000 layers",
    ),
}


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, dict(model.named_modules()), {n: p.requires_grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "damage", "message"), CASES.values(), ids=CASES.keys())
def test_one_clear_error_and_the_model_as_it_was(
    files: Path, tmp_path: Path, name: str, damage: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / name
    (shutil.copytree if (files / name).is_dir() else shutil.copy)(files / name, path)
    damage(path)
    plain, patched, elsewhere = tiny(), tiny(), tiny()
    fastlora.patch(patched, rank=3)
    fastlora.patch(elsewhere, targets="fc1")
    for model, options in ((plain, {}), (patched, {"adapter": "second"}), (elsewhere, {"adapter": "second"})):
        state, modules, flags = snapshot(model)
        with pytest.raises(ValueError, match=message) as error:
            fastlora.load(model, path, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        now, modules_now, flags_now = snapshot(model)
        assert modules_now == modules and flags_now == flags and list(now) == list(state)
        assert all(torch.equal(now[key], state[key]) for key in state)
    assert not RAN


@pytest.mark.parametrize("name", ["native.safetensors", "peft", "paper.pt"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError], ids=lambda e: e.__name__)
@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        ("fastlora.checkpoint", "plan"),
        ("fastlora.checkpoint", "_put"),
        ("fastlora.patch", "mark"),
        ("fastlora.patch", "adopt"),
        ("fastlora.patch", "parameters_of"),
        ("fastlora.layers:LoRALayer", "add"),
    ],
)
def test_stopped_on_the_way(
    files: Path, name: str, owner: str, attribute: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt or a full memory in whatever takes time, at its first call or its third: the model is as it was."""
    place = pkgutil.resolve_name(owner) if ":" in owner else sys.modules[owner]
    real = getattr(place, attribute)
    for stop in (1, 3):
        plain, half = tiny(), tiny()
        fastlora.patch(half, encoders="text")
        for model in (plain, half):
            calls = itertools.count(1)

            def counted(*args: Any, _calls: Any = calls, _stop: int = stop, **kwargs: Any) -> Any:
                if next(_calls) == _stop:
                    raise error
                return real(*args, **kwargs)

            state, modules, flags = snapshot(model)
            monkeypatch.setattr(place, attribute, counted)
            try:
                fastlora.load(model, files / name, adapter="second")
            except error:
                now, modules_now, flags_now = snapshot(model)
                assert modules_now == modules and flags_now == flags and list(now) == list(state)
                assert all(torch.equal(now[key], state[key]) for key in state)
            else:
                assert next(calls) <= stop  # so often it was not called
            monkeypatch.undo()


def test_good_files_load(files: Path) -> None:
    """What the cases above damage is sound."""
    for name in ("native.safetensors", "peft", "paper.pt"):
        assert fastlora.load(tiny(), files / name).patched


def test_old_weights_of_peft(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "peft", tmp_path / "peft")
    old_weights(dict)(tmp_path / "peft")
    assert fastlora.load(tiny(), tmp_path / "peft").patched
