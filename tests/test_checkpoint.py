"""Adapter files: a round trip, and one clear error for each file that does not fit, with the model untouched."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastlora
from fastlora.checkpoint.files import atomic_folder
from models import features, inputs, randomise_adapters, tiny


def saved(tmp_path: Path, **options: Any) -> tuple[Any, Path]:
    model = tiny()
    fastlora.patch(model, **options)
    randomise_adapters(model)
    path = tmp_path / "adapter.safetensors"
    fastlora.save(model, path)
    return model, path


def rewrite(path: Path, tensors: dict[str, torch.Tensor] | None = None, **values: Any) -> None:
    """The same file with other tensors or other values in its metadata."""
    with safe_open(path, "pt") as file:
        old = json.loads(file.metadata()["fastlora"])
    metadata = {"fastlora": json.dumps(old | values)}
    save_file(load_file(path) if tensors is None else tensors, path, metadata=metadata)


def _broken_metadata(path: Path) -> None:
    save_file(load_file(path), path, metadata={"fastlora": "{"})


@pytest.mark.parametrize("options", [{}, {"targets": ("o", "fc1"), "rank": 3, "layers": (1,)}, {"encoders": "text"}], ids=str)
def test_round_trip_into_a_plain_and_a_patched_model(tmp_path: Path, options: dict[str, Any]) -> None:
    model, path = saved(tmp_path, **options)
    images, tokens = inputs(model)
    expected = features(model, images, tokens)
    plain, patched = tiny(), tiny()
    fastlora.patch(patched, **options)
    for other in (plain, patched):
        fastlora.load(other, path)
        for now, then in zip(features(other, images, tokens), expected, strict=True):
            assert torch.equal(now, then)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_load_does_not_move_the_generator(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    model = tiny()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fastlora.load(model, path)
    assert torch.equal(torch.rand(1), expected)


def test_a_half_precision_copy_is_the_same_base(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    fastlora.load(tiny().half(), path)


def test_saving_a_merged_model_saves_its_adapter_and_base(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    before = load_file(path)
    fastlora.merge(model)
    fastlora.save(model, path)
    assert all(torch.equal(v, before[k]) for k, v in load_file(path).items())
    fastlora.load(tiny(), path)


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"lora_A": torch.zeros(2)}))


def _torch_file(path: Path) -> None:
    torch.save({"lora_A": torch.zeros(2)}, path)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _change_tensors(change: Any) -> Any:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors, sorted(tensors)[0])
        rewrite(path, tensors)

    return damage


def _set_nan(tensors: Any, name: str) -> None:
    tensors[name][0, 0] = float("nan")


def _cut(tensors: Any, name: str) -> None:
    tensors[name] = tensors[name][:, :-1].contiguous()


def _many(tensors: Any, _: str) -> None:
    tensors.update({f"x{i}": torch.zeros(1) for i in range(20_000)})


FILES: dict[str, tuple[Any, str]] = {
    "truncated": (_truncated, "not a readable safetensors adapter"),
    "pickle": (_pickled, "not a readable safetensors adapter"),
    "torch": (_torch_file, "not a readable safetensors adapter"),
    "empty": (_empty, "not a readable safetensors adapter"),
    "foreign": (lambda p: save_file({"weight": torch.zeros(2)}, p), "is no fastlora adapter"),
    "format": (lambda p: rewrite(p, format="other"), "is no fastlora adapter"),
    "metadata-json": (_broken_metadata, "not a readable safetensors adapter"),
    "config-type": (lambda p: rewrite(p, config="{"), "not a readable safetensors adapter"),
    "config-key": (lambda p: rewrite(p, config={"r": 2}), "unknown LoRA option 'r'"),
    "config-value": (lambda p: rewrite(p, config={"rank": 0}), "rank must be"),
    "missing": (_change_tensors(lambda t, n: t.pop(n)), "it lacks transformer.resblocks.0.attn.lora_A"),
    "extra": (_change_tensors(lambda t, n: t.update(other=t[n].clone())), "it holds other"),
    "shape": (_change_tensors(_cut), r"lora_A is \(3, 1, 48\), here \(3, 2, 48\)"),
    "nan": (_change_tensors(_set_nan), "holds NaN or infinite values"),
    "20000-keys": (_change_tensors(_many), "20000 tensors have no place here"),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES.keys())
def test_a_bad_file_is_refused_and_the_model_untouched(tmp_path: Path, damage: Any, message: str) -> None:
    _, path = saved(tmp_path)
    damage(path)
    for model in (tiny(), tiny()):
        modules = dict(model.named_modules())
        with pytest.raises(ValueError, match=message) as error:
            fastlora.load(model, path)
        assert "\n" not in str(error.value)
        assert dict(model.named_modules()) == modules
    patched = tiny()
    fastlora.patch(patched)
    before = [p.detach().clone() for p in fastlora.lora_parameters(patched)]
    with pytest.raises(ValueError):
        fastlora.load(patched, path)
    assert all(torch.equal(a, b) for a, b in zip(before, fastlora.lora_parameters(patched), strict=True))


def test_another_model_rank_config_or_base_is_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="is for another model: it lacks transformer"):
        fastlora.load(tiny(text_cfg={"layers": 4}), path)
    with pytest.raises(ValueError, match=r"is for another model: it holds transformer\.resblocks\.2"):
        fastlora.load(tiny(text_cfg={"layers": 2}), path)
    with pytest.raises(ValueError, match=r"here \(3, 2, 64\)"):
        fastlora.load(tiny(text_cfg={"width": 64}), path)
    other = tiny(seed=1)
    with pytest.raises(ValueError, match="trained on other base weights"):
        fastlora.load(other, path)
    fastlora.load(other, path, check_base=False)
    patched = tiny()
    fastlora.patch(patched, rank=3)
    with pytest.raises(ValueError, match=r"rank=2.*rank=3"):
        fastlora.load(patched, path)


def test_equal_adapters_are_equal_files(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    before = path.read_bytes()
    fastlora.save(model, path)
    assert path.read_bytes() == before


def test_no_such_file() -> None:
    with pytest.raises(FileNotFoundError, match="no adapter file at nowhere"):
        fastlora.load(tiny(), "nowhere")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = saved(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr("fastlora.checkpoint.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        fastlora.save(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.safetensors"]
    monkeypatch.undo()
    with pytest.raises(OSError, match="cannot write"):
        fastlora.save(model, tmp_path / "missing" / "adapter.safetensors")


@pytest.mark.parametrize("form", ["fastlora", "peft", "clip-lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_values_under_any_default_dtype(tmp_path: Path, dtype: torch.dtype, form: Any) -> None:
    model, _ = saved(tmp_path)
    want = [p.detach().clone() for p in fastlora.lora_parameters(model)]
    other, again = tiny(), tiny()
    torch.set_default_dtype(dtype)
    try:
        fastlora.save(model, tmp_path / "x", format=form)
        fastlora.load(other, tmp_path / "x")
    finally:
        torch.set_default_dtype(torch.float32)
    fastlora.load(again, tmp_path / "x")
    for loaded in (other, again):
        got = fastlora.lora_parameters(loaded)
        assert all(p.dtype == torch.float32 and torch.equal(p, q) for p, q in zip(got, want, strict=True))


@pytest.mark.parametrize("form", ["fastlora", "peft", "clip-lora"])
def test_the_same_values_under_another_default_device(tmp_path: Path, form: Any) -> None:
    model, _ = saved(tmp_path)
    other = tiny()
    with torch.device("meta"):
        fastlora.save(model, tmp_path / "x", format=form)
        fastlora.load(other, tmp_path / "x")
    pairs = zip(fastlora.lora_parameters(other), fastlora.lora_parameters(model), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize("form", ["fastlora", "peft", "clip-lora"])
@pytest.mark.parametrize("check_base", [True, False])
def test_a_model_without_memory_is_refused(tmp_path: Path, form: Any, check_base: bool) -> None:
    model, _ = saved(tmp_path)
    fastlora.save(model, tmp_path / "x", format=form)
    with torch.device("meta"):
        empty = tiny()
    modules = dict(empty.named_modules())
    with pytest.raises(ValueError, match="on the meta device and would lose the values"):
        fastlora.load(empty, tmp_path / "x", check_base=check_base)
    assert dict(empty.named_modules()) == modules


def test_values_too_large_for_adapters_in_half_precision(tmp_path: Path) -> None:
    model, path = saved(tmp_path)
    with torch.no_grad():
        fastlora.lora_parameters(model)[0][0, 0, 0] = 1e6
    fastlora.save(model, path)
    other = tiny()
    fastlora.patch(other)
    other.half()
    before = [p.detach().clone() for p in fastlora.lora_parameters(other)]
    with pytest.raises(ValueError, match="holds NaN or infinite values, at least in float16"):
        fastlora.load(other, path)
    assert all(torch.equal(a, b) for a, b in zip(before, fastlora.lora_parameters(other), strict=True))


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_a_file_is_known_whatever_its_name_and_length(tmp_path: Path, first: int) -> None:
    """The first byte of safetensors is of the header's length, and may be that of a pickle or a zip."""
    model = tiny()
    fastlora.patch(model)
    fastlora.save(model, tmp_path / "a.safetensors")
    raw = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size] + b" " * ((first - size) % 256)
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    fastlora.load(tiny(), tmp_path / "a")


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """Nothing of anybody else's goes, whatever it is called, and what is made may be read by whoever may read its parent."""
    mine = tmp_path / f".a.{os.getpid()}.tmp" / "notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "a") as made:
        (made / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [mine.parent]
    with atomic_folder(tmp_path / "a") as made:
        (made / "whole").touch()
    assert mine.read_text() == "mine" and [p.name for p in (tmp_path / "a").iterdir()] == ["whole"]
    assert (tmp_path / "a").stat().st_mode == mine.parent.stat().st_mode
    with pytest.raises(FileExistsError, match="is there and not empty"), atomic_folder(tmp_path / "a"):
        pass
