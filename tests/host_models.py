"""One model of every row of docs/hosts.md, with inputs and what to compare. Real configs at full width, cut in depth."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from typing import Any

import timm
import torch
import transformers
from open_clip import CLIP, CoCa, CustomTextCLIP
from open_clip.factory import get_model_config
from torch import Tensor, nn

import stand_ins

__all__ = ["HOSTS", "Host"]

DEPTH, WORDS = 1, 200


@dataclasses.dataclass(frozen=True)
class Host:
    """A row of the table.

    Args:
        build: the model with random weights, in eval mode.
        inputs: what `run` takes beside the model, for two examples; floating-point tensors are cast to the model's dtype.
        run: model, inputs -> the features that its towers give.
        quick: whether the suite tries every column; of the others it checks which modules are adapted, and the script the rest.
        source: where the configuration comes from and what was cut.
    """

    family: str
    model: str
    source: str
    build: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    run: Callable[..., tuple[Tensor, ...]]
    quick: bool = False

    def outputs(self, model: nn.Module) -> tuple[Tensor, ...]:
        """What `run` gives on `inputs`."""
        return self.run(model, *self.inputs_for(model))

    def inputs_for(self, model: nn.Module) -> tuple[Tensor, ...]:
        """`inputs` in the dtype of the model's first floating-point parameter."""
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in self.inputs)


def images(size: int) -> Tensor:
    """(2, 3, size, size)."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens(length: int, words: int = WORDS) -> Tensor:
    """(2, length) ids; the largest, the end token, stands inside, zeros after it."""
    ids = torch.randint(3, words - 1, (2, length), generator=torch.Generator().manual_seed(0))
    for i, end in enumerate((length // 3, length // 2)):
        ids[i, end], ids[i, end + 1 :] = words - 1, 0
    return ids


def run_clip(model: Any, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """encode_image and encode_text of open_clip's and OpenAI's models; CoCa's give tokens beside the features."""
    return tuple(f[0] if isinstance(f, tuple) else f for f in (model.encode_image(image), model.encode_text(text)))


def from_open_clip(name: str, cut: str = "") -> Host:
    """open_clip's model `name`, its own towers and those of timm cut to DEPTH blocks."""

    def build() -> Any:
        torch.manual_seed(0)
        config = get_model_config(name)
        assert config is not None
        custom, text, vision = config.pop("custom_text", False), config["text_cfg"], config["vision_cfg"]
        if "hf_model_name" in text:  # a folder with the config stands in for the hub
            folder = tempfile.mkdtemp()
            transformers.RobertaConfig(
                vocab_size=WORDS, num_hidden_layers=DEPTH, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1
            ).save_pretrained(folder)
            text["hf_model_name"], text["hf_model_pretrained"] = folder, False
        text |= {"vocab_size": WORDS, "layers": DEPTH}
        if "timm_model_name" not in vision:
            vision["layers"] = DEPTH
        if "multimodal_cfg" in config:
            config["multimodal_cfg"] |= {"layers": DEPTH}
            model: Any = CoCa(**config)
        else:
            model = (CustomTextCLIP if custom or "hf_model_name" in text else CLIP)(**config)
        trunk = getattr(model.visual, "trunk", None)
        if hasattr(trunk, "blocks"):
            trunk.blocks = trunk.blocks[:DEPTH]
        return model.eval()

    config = get_model_config(name)
    assert config is not None
    length = config["text_cfg"].get("context_length", 77) - ("multimodal_cfg" in config)
    source = f"open_clip's config at {DEPTH} block a tower, {WORDS} words" + cut
    return Host("open_clip", name, source, build, (images(224), tokens(length)), run_clip)


def custom_blocks() -> Any:
    """A CLIP whose blocks are open_clip's custom ones, with normalised queries and keys."""
    from open_clip.transformer import CustomResidualAttentionBlock

    torch.manual_seed(0)
    model = CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        text_cfg={"context_length": 16, "vocab_size": WORDS, "width": 64, "heads": 2, "layers": 2},
    )
    for transformer in (model.visual.transformer, model.transformer):
        for i in range(2):
            block = CustomResidualAttentionBlock(64, 2, qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True)
            transformer.resblocks[i] = block
    return model.eval()


def stand_in(attention: type[nn.Module]) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        return stand_ins.CLIP(attention, words=WORDS).eval()

    return build


def from_transformers(
    name: str, config: Callable[[], Any], inputs: tuple[Tensor, ...], run: Callable[..., tuple[Tensor, ...]],
    quick: bool = False,
) -> Host:  # fmt: skip
    def build() -> Any:
        torch.manual_seed(0)
        return getattr(transformers, name)(config()).eval()

    source = f"transformers' default config at {DEPTH} block a tower, {WORDS} words"
    return Host("transformers", name, source, build, inputs, run, quick)


TEXT: dict[str, Any] = {
    "vocab_size": WORDS, "num_hidden_layers": DEPTH, "bos_token_id": WORDS - 2, "eos_token_id": WORDS - 1, "pad_token_id": 0
}  # fmt: skip


def clip_config() -> Any:
    return transformers.CLIPConfig(text_config=TEXT, vision_config={"num_hidden_layers": DEPTH})


def siglip_config() -> Any:
    return transformers.SiglipConfig(text_config=TEXT, vision_config={"num_hidden_layers": DEPTH})


def siglip2_config() -> Any:
    return transformers.Siglip2Config(text_config=TEXT, vision_config={"num_hidden_layers": DEPTH})


def run_pair(model: Any, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """The features of both towers, with padding masked."""
    out = model(pixel_values=image, input_ids=text, attention_mask=(text != 0).long())
    return out.image_embeds, out.text_embeds


def run_patches(model: Any, patches: Tensor, mask: Tensor, shapes: Tensor, text: Tensor) -> tuple[Tensor, ...]:
    """SigLIP 2 takes patches of images of several shapes, with a mask."""
    out = model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes, input_ids=text)
    return out.image_embeds, out.text_embeds


def patches() -> tuple[Tensor, Tensor, Tensor]:
    """Two images of 4 x 4 and 3 x 4 patches of 16 x 16, padded to 16, their mask, their shapes."""
    cut = images(64).unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    mask = torch.ones(2, 16, dtype=torch.int32)
    mask[1, 12:] = 0
    return cut, mask, torch.tensor([[4, 4], [3, 4]])


def text_encoder(name: str, build: Callable[[], Any]) -> Host:
    """One of the text models that open_clip wraps, two small blocks with random weights."""

    def seeded() -> Any:
        torch.manual_seed(0)
        return build().eval()

    source = "transformers' class at 2 blocks, width 32, as open_clip wraps it"
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    return Host("transformers", name, source, seeded, (ids,), lambda model, ids: (model(input_ids=ids).last_hidden_state,))


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes))


def mt5() -> Any:
    return transformers.MT5EncoderModel(
        transformers.MT5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    )


def nllb() -> Any:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 64))}
    config = transformers.M2M100Config(vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=1, **sides)
    return transformers.M2M100Model(config).encoder


def from_timm(name: str, size: int = 224, **changes: Any) -> Host:
    def build() -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, depth=DEPTH, num_classes=0, **changes).eval()

    cut = "".join(f", {key}={value}" for key, value in changes.items())
    source = f"timm's config at {DEPTH} block{cut}"
    return Host("timm", name, source, build, (images(size),), lambda model, image: (model(image),), size < 224)


HOSTS = (
    from_open_clip("ViT-B-32"),
    from_open_clip("ViT-B-16-quickgelu"),
    from_open_clip("ViT-L-14"),
    from_open_clip("EVA02-B-16"),
    from_open_clip("ViT-B-16-SigLIP"),
    from_open_clip("coca_ViT-B-32"),
    from_open_clip("convnext_tiny", ", vision whole"),
    from_open_clip("roberta-ViT-B-32", ", the text config of RobertaConfig()"),
    Host(
        "open_clip", "custom blocks", "open_clip's CustomResidualAttentionBlock, width 64",
        custom_blocks, (images(32), tokens(16)), run_clip, True,
    ),
    Host(
        "open_clip 4", "CLIP", "a stand-in with its attention's parameters, width 64", stand_in(stand_ins.PackedAttention),
        (images(32), tokens(16)), run_clip, True,
    ),
    Host(
        "open_clip 4", "CLIP, scaled", "a stand-in with its custom blocks' norms and scales, width 64",
        stand_in(stand_ins.ScaledAttention), (images(32), tokens(16)), run_clip, True,
    ),
    Host(
        "OpenAI clip", "CLIP", "a stand-in with its classes' attributes, width 64", stand_in(nn.MultiheadAttention),
        (images(32), tokens(16)), run_clip, True,
    ),
    from_transformers("CLIPModel", clip_config, (images(224), tokens(77)), run_pair),
    from_transformers(
        "CLIPVisionModel", lambda: clip_config().vision_config, (images(224),),
        lambda model, image: (model(pixel_values=image).pooler_output,),
    ),
    from_transformers(
        "CLIPTextModel", lambda: clip_config().text_config, (tokens(77),),
        lambda model, text: (model(input_ids=text).pooler_output,), True,
    ),
    from_transformers("SiglipModel", siglip_config, (images(224), tokens(64)), run_pair),
    from_transformers("Siglip2Model", siglip2_config, (*patches(), tokens(64)), run_patches),
    text_encoder("BertModel", bert),
    text_encoder("MT5EncoderModel", mt5),
    text_encoder("M2M100 (NLLB) encoder", nllb),
    from_timm("vit_base_patch16_224"),
    from_timm("vit_small_patch14_dinov2", 70, img_size=70),
    from_timm("eva02_tiny_patch14_224", 70, img_size=70),
    from_timm("beit_base_patch16_224", 64, img_size=64),
    from_timm("vit_tiny_patch16_224", 64, img_size=64, qk_norm=True),
)  # fmt: skip
