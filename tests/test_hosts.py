"""Every family of hosts: the table of docs/hosts.md, the options of their attention, modules by name, what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fastlora
import host_models
import hosts_table
import stand_ins
from fastlora.hosts.timm import layout as timm_layout
from fastlora.layers import LoRAHostAttention, LoRALinear, LoRAMultiheadAttention
from fastlora.layers.packing import packed
from fastlora.record import lora_layers
from host_models import HOSTS, Host
from models import randomise_adapters, tiny


def committed() -> dict[str, list[str]]:
    """The cells of docs/hosts.md's table by "family model"."""
    text = hosts_table.DOC.read_text(encoding="utf-8").split(hosts_table.START)[1].split(hosts_table.END)[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].strip().splitlines()]
    assert lines[0] == ["family", "model", *hosts_table.COLUMNS, "source"], "columns changed: run tests/hosts_table.py"
    return {f"{cells[0]} {cells[1]}": cells for cells in lines[2:]}


def test_the_table_has_these_hosts() -> None:
    assert list(committed()) == [f"{host.family} {host.model}" for host in HOSTS]


# PEFT asks transformers by an old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: f"{host.family}-{host.model}")
def test_the_table_says_what_is_so(host: Host) -> None:
    said = committed()[f"{host.family} {host.model}"]
    if host.quick:
        assert hosts_table.cells(host) == said
    else:
        assert [host.family, host.model, hosts_table.sites(host)] == said[:3]


def small_clip(**attention: Any) -> Any:
    """transformers' CLIPModel of two small blocks a tower."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config=sizes | words, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    for part in (config.text_config, config.vision_config):
        part.attention_dropout = attention.get("dropout", 0.0)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.set_attn_implementation(attention.get("implementation", "sdpa"))
    return model


PAIR = (host_models.images(32), host_models.tokens(16, 100))


def projections(model: nn.Module) -> list[LoRAHostAttention]:
    return [layer for _, layer in lora_layers(model) if isinstance(layer, LoRAHostAttention)]


def test_separate_projections_are_views_of_one_weight_and_one_product_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_clip()
    fastlora.patch(model, dropout=0.0, targets=("q", "v"))
    randomise_adapters(model)
    layer = model.vision_model.encoder.layers[0].self_attn
    assert packed(layer.base_weights()) and isinstance(layer, type(small_clip().vision_model.encoder.layers[0].self_attn))
    assert layer.base_weight.data_ptr() == layer.q_proj.weight.data_ptr()
    calls: list[torch.Size] = []
    monkeypatch.setattr(
        "fastlora.layers.base.lora_linear",
        lambda x, weight, *args, **options: calls.append(weight.shape) or fastlora.lora_linear(x, weight, *args, **options),
    )
    model.get_image_features(PAIR[0])
    assert calls == [torch.Size([96, 32])] * 2


TAKEN_APART = {
    "double": lambda model: model.double(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "load": lambda model: model.load_state_dict(model.state_dict()) and model,
    "assign": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True) and model,
}


@pytest.mark.parametrize("change", TAKEN_APART.values(), ids=TAKEN_APART.keys())
def test_packing_survives(change: Any) -> None:
    model = small_clip()
    fastlora.patch(model, dropout=0.0)
    randomise_adapters(model)
    expected = host_models.run_pair(model, *PAIR)
    model = change(model)
    assert all(packed(weights) for layer in projections(model) for weights in (layer.base_weights(), layer._biases()))
    double = model.dtype == torch.float64
    images = PAIR[0].double() if double else PAIR[0]
    for now, then in zip(host_models.run_pair(model, images, PAIR[1]), expected, strict=True):
        torch.testing.assert_close(now.float(), then)


def test_a_projection_that_was_replaced_counts_packed_or_not() -> None:
    model = small_clip()
    fastlora.patch(model, dropout=0.0)
    for layer in projections(model):
        layer.k_proj.weight = nn.Parameter(torch.randn_like(layer.k_proj.weight), requires_grad=False)
        assert not packed(layer.base_weights())
    expected = host_models.run_pair(model, *PAIR)
    fastlora.merge(model)
    fastlora.unpatch(model)
    for now, then in zip(host_models.run_pair(model, *PAIR), expected, strict=True):
        torch.testing.assert_close(now, then)
    attention = model.vision_model.encoder.layers[0].self_attn
    assert not packed([attention.q_proj.weight, attention.v_proj.weight])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_masks_and_weights_are_the_hosts(implementation: str) -> None:
    model = small_clip(implementation=implementation)

    def run() -> Any:
        return model(
            pixel_values=PAIR[0], input_ids=PAIR[1], attention_mask=(PAIR[1] != 0).long(),
            output_attentions=implementation == "eager", output_hidden_states=True,
        )  # fmt: skip

    before = run()
    fastlora.patch(model, targets=("q", "k", "v", "o", "fc1", "fc2"))
    after = run()
    for tower in ("text_model_output", "vision_model_output"):
        for what in ("attentions", "hidden_states"):
            ours, theirs = getattr(after[tower], what), getattr(before[tower], what)
            assert (ours is None) == (theirs is None) == (what == "attentions" and implementation == "sdpa")
            for a, b in zip(ours or (), theirs or (), strict=True):
                torch.testing.assert_close(a, b)


def test_attention_dropout_is_the_hosts() -> None:
    model = small_clip(dropout=0.5).train()
    torch.manual_seed(3)
    before = host_models.run_pair(model, *PAIR)
    fastlora.patch(model, dropout=0.0)  # draws the initial lora_A
    torch.manual_seed(3)
    for now, then in zip(host_models.run_pair(model, *PAIR), before, strict=True):
        torch.testing.assert_close(now, then)


def test_flags_of_a_packed_attention_are_the_hosts() -> None:
    torch.manual_seed(0)
    model = stand_ins.CLIP(stand_ins.PackedAttention)
    attention, x = model.transformer.resblocks[0].attn, torch.randn(2, 5, 64)
    other = torch.randn(2, 7, 64)
    calls: list[dict[str, Any]] = [{}, {"attn_mask": torch.randn(5, 5)}, {"k_x": x, "v_x": x}, {"k_x": other, "v_x": other}]
    before = [attention(x, **call) for call in calls]
    fastlora.patch(model)
    layer = model.transformer.resblocks[0].attn
    assert isinstance(layer, LoRAHostAttention)
    for call, then in zip(calls, before, strict=True):
        torch.testing.assert_close(layer(x, **call), then)
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(x, need_weights=True)


def test_a_host_that_passes_its_weight_by_is_an_error_not_silence() -> None:
    class Elsewhere(stand_ins.PackedAttention):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return x @ self.in_proj_weight.T[:, : x.shape[-1]]

    model = stand_ins.CLIP(Elsewhere)
    fastlora.patch(model)
    with pytest.raises(RuntimeError, match="matmul takes the weight of a LoRAElsewhere past its adapter"):
        model.encode_image(PAIR[0])


def test_a_weight_cut_in_three_counts_its_adapter_whatever_comes_in() -> None:
    """open_clip 4 hands x as keys and values too, its attention cuts the weight; with other keys it projects these."""
    torch.manual_seed(0)
    model, x, other = stand_ins.CLIP(stand_ins.PackedAttention).eval(), torch.randn(2, 5, 64), torch.randn(2, 7, 64)
    twin = copy.deepcopy(model)
    fastlora.patch(model, dropout=0.0, targets=("q", "v"))
    randomise_adapters(model)
    layer, plain = model.transformer.resblocks[0].attn, twin.transformer.resblocks[0].attn
    with torch.no_grad():
        plain.in_proj_weight += layer.delta()
    for call in ({}, {"k_x": x, "v_x": x}, {"k_x": other, "v_x": other}, {"v_x": x}):
        torch.testing.assert_close(layer(x, **call), plain(x, **call))


def test_a_projection_without_its_bias_stays_without() -> None:
    class Unbiased(type(small_clip().vision_model.encoder.layers[0].self_attn)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.v_proj.weight) + self.q_proj(x)

    model = small_clip()
    attention = model.vision_model.encoder.layers[0].self_attn
    attention.__class__ = Unbiased
    nn.init.normal_(attention.v_proj.bias), nn.init.normal_(attention.q_proj.bias)
    x = torch.randn(2, 5, 32)
    want = attention(x)
    fastlora.patch(model)
    torch.testing.assert_close(model.vision_model.encoder.layers[0].self_attn(x), want)


def test_half_precision_weights_of_openai() -> None:
    """Its loader casts Linears, attention and convolutions, not norms."""
    model = stand_ins.CLIP().eval()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            module.to(torch.bfloat16)
    attention = model.visual.transformer.resblocks[0].attn
    x = torch.randn(5, 2, 64).to(torch.bfloat16)
    before = attention(x, x, x, need_weights=False)[0]
    fastlora.patch(model)
    layer = model.visual.transformer.resblocks[0].attn
    assert isinstance(layer, LoRAMultiheadAttention) and layer.lora_A is not None and layer.lora_A.dtype == torch.float32
    torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], before)


class Mixed(nn.Module):
    """A model of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv, self.up, self.down = nn.Linear(16, 48), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.down(F.gelu(self.up(x + F.scaled_dot_product_attention(q, k, v))))


class TestByName:
    def patched(self, *modules: str, **options: Any) -> tuple[Mixed, dict[str, Any]]:
        model = Mixed().eval()
        report = fastlora.patch(model, modules=modules, dropout=0.0, **options)
        assert set(report.patched) <= {path for path, _ in lora_layers(model)}
        return model, {path: layer for path, layer in lora_layers(model) if layer.adapted}

    def test_linears_and_attention(self) -> None:
        x = torch.randn(2, 5, 16)
        torch.manual_seed(0)
        expected = Mixed()(x)
        torch.manual_seed(0)
        model, layers = self.patched("attn", "qkv:qkv", "up", targets=("q", "v", "o"))
        torch.testing.assert_close(model(x), expected)
        active = {path: layer.spec.active for path, layer in layers.items()}
        assert active == {
            "attn": (True, False, True), "attn.out_proj": (True,), "qkv": (True, False, True), "up": (True,)
        }  # fmt: skip
        randomise_adapters(model)
        model(x).sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fastlora.lora_parameters(model))

    def test_everything(self) -> None:
        model, layers = self.patched("*")
        assert list(layers) == ["attn", "qkv", "up", "down"] and isinstance(model.qkv, LoRALinear)

    def test_saved_and_loaded(self, tmp_path: Any) -> None:
        model, _ = self.patched("*.out_proj", "attn", "down", targets=("q", "o"))
        fresh = copy.deepcopy(model)
        fastlora.unpatch(fresh)
        randomise_adapters(model)
        fastlora.save(model, tmp_path / "a.safetensors")
        fastlora.load(fresh, tmp_path / "a.safetensors")
        x = torch.randn(2, 5, 16)
        assert torch.equal(fresh(x), model(x))

    @pytest.mark.parametrize(
        ("modules", "message"),
        [
            (("attn", "nothing.*"), "no nn.Linear and no nn.MultiheadAttention matches 'nothing"),
            (("attn.out_proj",), "name the attention, with target o"),
            (("down:qkv",), "its 16 rows are not q, k and v"),
            (("",), "must be name patterns"),
        ],
        ids=["unused", "out_proj", "rows", "empty"],
    )
    def test_what_cannot_be(self, modules: tuple[str, ...], message: str) -> None:
        model = Mixed()
        before = dict(model.named_modules())
        with pytest.raises(ValueError, match=message):
            fastlora.patch(model, modules=modules)
        assert dict(model.named_modules()) == before

    def test_encoders_and_layers_have_no_say(self) -> None:
        with pytest.raises(ValueError, match="modules chooses by name"):
            fastlora.patch(Mixed(), modules=("up",), layers=(0,))

    def test_torchs_own_encoder_layer_is_refused(self) -> None:
        model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 16))
        report = fastlora.patch(model, modules=("*",))
        assert report.patched == ("1",)
        assert "reads its weights without calling it" in report.skipped["0.self_attn"] and "0.linear1" in report.skipped

    def test_a_module_at_two_places_takes_one_adapter(self) -> None:
        shared = nn.Linear(8, 8)
        model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(shared), nn.Sequential(nn.Linear(8, 8)))
        model[2][0] = shared
        report = fastlora.patch(model, modules=("*",))
        assert report.patched == ("0", "1.0")


def test_a_weight_that_another_module_holds_too_is_refused() -> None:
    """Its adapter would count there as well, and merging would change what the other computes."""
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(8, 8), "head": nn.Linear(8, 8), "one": nn.Linear(8, 8), "two": nn.Linear(8, 8)}
    )
    model["head"].weight, model["two"].weight = model["embedding"].weight, model["one"].weight
    model["free"] = nn.Linear(8, 8)
    report = fastlora.patch(model, modules=("*",))
    assert report.patched == ("free",) and list(report.skipped) == ["head", "one", "two"]
    assert all("another module's too" in why for why in report.skipped.values())


def test_what_was_looked_for_is_named() -> None:
    with pytest.raises(TypeError, match=r"looked for open_clip.*CustomTextCLIP.*transformers.*timm.*modules="):
        fastlora.patch(Mixed())


class OwnForward(nn.Linear):
    """What no drop-in may stand in for."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).abs()


def test_a_linear_with_a_forward_of_its_own_is_refused() -> None:
    model = tiny()
    model.transformer.resblocks[1].mlp.c_fc = OwnForward(48, 192)
    report = fastlora.patch(model, targets=("q", "fc1"))
    assert report.skipped == {"transformer.resblocks.1.mlp.c_fc": "OwnForward has a forward of its own"}


def test_parametrised_and_quantised_weights_are_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    report = fastlora.patch(model, modules=("*",))
    assert report.patched == ("2",) and list(report.skipped) == ["0", "1"]
    assert all("plain floating-point weight" in why for why in report.skipped.values())


def test_a_block_that_is_unknown_is_named() -> None:
    model = tiny()
    model.transformer.resblocks[1].mlp = nn.Identity()
    report = fastlora.patch(model)
    assert list(report.skipped) == ["transformer.resblocks.1"] and len(report.patched) == 5


def test_grouped_queries_get_an_adapter_each() -> None:
    """Fewer keys and values than queries: three weights that cannot be one, so three Linears."""
    block = nn.Module()
    block.attn = nn.Module()
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        block.attn.add_module(name, nn.Linear(16, rows))
    layout = timm_layout(block)
    assert layout is not None
    sites = [(site.path, site.targets, site.weights) for site in layout.sites(block, "blocks.0")]
    assert sites == [(f"blocks.0.attn.{t}_proj", (t,), ()) for t in ("q", "k", "v")]


@pytest.mark.parametrize("host", [h for h in HOSTS if h.family in ("OpenAI clip", "transformers")][:2], ids=lambda h: h.model)
def test_the_encoders_say_that_they_serve_open_clip(host: Host) -> None:
    model = host.build()
    fastlora.patch(model)
    with pytest.raises(TypeError, match=f"know open_clip's CLIP, CustomTextCLIP and CoCa, not {type(model).__qualname__}"):
        fastlora.encode_image(model, host.inputs[0])


def test_the_encoders_run_a_towers_own_method() -> None:
    host = next(h for h in HOSTS if h.model == "roberta-ViT-B-32")
    model = host.build()
    fastlora.patch(model, dropout=0.0)
    randomise_adapters(model)
    torch.testing.assert_close(fastlora.encode_text(model, host.inputs[1]), model.encode_text(host.inputs[1]))


def test_masks_differ_between_projections_and_layers_of_a_host() -> None:
    """Two passes draw other masks, one seed the same; a layer's site is its own."""
    model = small_clip().train()
    fastlora.patch(model, dropout=0.5)
    randomise_adapters(model)
    sites = [layer.spec.site for _, layer in lora_layers(model)]
    assert len(set(sites)) == len(sites) == 4
    torch.manual_seed(0)
    first, second = model.get_image_features(PAIR[0]), model.get_image_features(PAIR[0])
    torch.manual_seed(0)
    again = model.get_image_features(PAIR[0])
    for value in ("pooler_output",):
        assert not torch.equal(first[value], second[value]) and torch.equal(first[value], again[value])


def test_a_gated_mlp_has_no_name_in_pefts_file_for_clip(tmp_path: Path) -> None:
    host = next(host for host in HOSTS if host.model == "EVA02-B-16")
    with pytest.raises(ValueError, match="CLIPModel, which has no gated MLP as at visual"):
        fastlora.save(hosts_table.patched(host), tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
