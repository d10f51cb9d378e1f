"""encode_text and encode_image against the host's own methods: values, gradients, masks; what is kept, what is skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import cpu, encoders, functional
from fastlora.adapters import lora_parameters
from fastlora.testing import assert_within_budget, assert_within_expected_budget

open_clip = pytest.importorskip("open_clip")
from open_clip.coca_model import CoCa  # noqa: E402  (needs the check above)
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402

VISION = {"layers": 3, "width": 64, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 20, "vocab_size": 100, "width": 48, "heads": 3, "layers": 3}
START, END = 98, 99
LENGTHS = (5, 9, 5, 7, 12, 3, 9)
SEED = 1234567
# Batches to a comparison of whole towers: the largest error of one is nearly a single random number (fastlora.testing).
DRAWS = 6

MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIP(32, VISION, TEXT),
    "quickgelu": lambda: CLIP(32, {**VISION, "patch_size": 4}, TEXT, quick_gelu=True),
    "custom-text-eos": lambda: CustomTextCLIP(32, VISION, {**TEXT, "pool_type": "eos", "eos_id": END}, quick_gelu=True),
    "layer-scale": lambda: CLIP(32, {**VISION, "ls_init_value": 0.3}, {**TEXT, "ls_init_value": 0.3}),
    "first-token": lambda: CustomTextCLIP(32, VISION, {**TEXT, "pool_type": "first"}),
    "siglip": lambda: CustomTextCLIP(
        32,
        {**VISION, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
        {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    ),
    "coca": lambda: CoCa(
        32,
        multimodal_cfg=dict(TEXT),
        text_cfg={**TEXT, "context_length": 19, "embed_cls": True, "output_tokens": True},
        vision_cfg={**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    ),
}
ALL_TARGETS = ("q", "k", "v", "o", "fc1", "fc2")


def prompts(length: int = 20, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Tensor:
    """Token ids (n, length): start, two words that all share, other words, end, padding of zeros."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), length, dtype=torch.long)
    for row, n in zip(tokens, lengths, strict=True):
        row[:n] = torch.randint(1, START, (n,), generator=generator)
        row[: min(3, n - 1)] = torch.tensor([START, 7, 8])[: n - 1]
        row[n - 1] = END
    return tokens


def images(count: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def build(name: str, *, patched: bool = True, seed: int = 0, **options: object) -> nn.Module:
    """A small model in training mode, its adapters away from zero so that every gradient is there."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    if patched:
        fastlora.patch(model, **{"rank": 4, "targets": ALL_TARGETS, **options})
        for parameter in lora_parameters(model):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def model_prompts(name: str, seed: int = 0) -> Tensor:
    return prompts(19 if name == "coca" else 20, seed=seed)


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every draw gives SEED, in the host's own forward pass as well; yields the list of draws."""
    real, drawn = functional.seed_tensor, []

    def fixed(seed: int | Tensor | None, device: torch.device) -> Tensor:
        if seed is None:
            drawn.append(SEED)
            seed = SEED
        return real(seed, device)

    for module in (functional, encoders.towers):
        monkeypatch.setattr(module, "seed_tensor", fixed)
    monkeypatch.setattr("fastlora.layers.LoRAMultiheadAttention._shared_seed", lambda self, x: fixed(None, x.device))
    yield drawn


def results(features: Tensor, parameters: list[nn.Parameter], seed: int = 3) -> dict[str, Tensor]:
    """Features, and the gradient of every parameter under a fixed random dy."""
    dy = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad(features, parameters, dy.to(features.dtype), allow_unused=True)
    named = {f"gradient {i} {tuple(p.shape)}": g for i, (p, g) in enumerate(zip(parameters, gradients, strict=True))}
    return {"features": features.detach()} | {name: g for name, g in named.items() if g is not None}


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


class TestAgainstTheHost:
    """The error rule of the house: as near to the float64 truth as the host's own method in the same dtype, times two."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["p0", "p0.25"])
    @pytest.mark.parametrize("name", MODELS)
    def test_text(self, name: str, dropout: float, dtype: torch.dtype, one_seed: list[int]) -> None:
        model = build(name, dropout=dropout)
        encoders.cast(model, dtype)
        exact = double(model)
        truth, host, ours = [], [], []
        for draw in range(DRAWS):
            tokens, parameters = model_prompts(name, draw), self.text_parameters(model)
            truth.append(results(exact.encode_text(tokens, normalize=False), self.text_parameters(exact)))
            host.append(results(model.encode_text(tokens, normalize=False), parameters))
            ours.append(results(encoders.encode_text(model, tokens), parameters))
        assert ours[0].keys() == host[0].keys() and len(ours[0]) > 10
        assert_within_expected_budget(ours, host, truth, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("dropout", [0.0, 0.25], ids=["p0", "p0.25"])
    @pytest.mark.parametrize("name", MODELS)
    def test_image(self, name: str, dropout: float, dtype: torch.dtype, one_seed: list[int]) -> None:
        model = build(name, dropout=dropout)
        encoders.cast(model, dtype)
        exact = double(model)
        truth, host, ours = [], [], []
        for draw in range(DRAWS):
            batch, parameters = images(seed=draw).to(dtype), self.vision_parameters(model)
            truth.append(results(exact.encode_image(batch.double(), normalize=False), self.vision_parameters(exact)))
            host.append(results(model.encode_image(batch, normalize=False), parameters))
            ours.append(results(encoders.encode_image(model, batch), parameters))
        assert ours[0].keys() == host[0].keys() and len(ours[0]) > 10
        assert_within_expected_budget(ours, host, truth, dtype)

    @pytest.mark.parametrize("targets", [("q",), ("v",), ("q", "v"), ("o",), ("fc1",), ("fc2",)], ids="-".join)
    def test_each_target_alone(self, targets: tuple[str, ...], one_seed: list[int]) -> None:
        model = build("quickgelu", targets=targets)
        exact = double(model)
        for call, batch in ((self.text, prompts()), (self.image, images())):
            host_truth, _ = call(exact, batch)
            host, ours = call(model, batch)
            assert_within_budget(ours, host, host_truth, torch.float32)

    @pytest.mark.parametrize("name", ["clip", "quickgelu", "coca"])
    def test_unpatched_with_gradients_of_every_weight(self, name: str) -> None:
        """Full fine-tuning: the base weights are trained, so they get the host's gradients."""
        model = build(name, patched=False)
        exact = double(model)
        tokens = model_prompts(name)
        for encode, method, batch in (
            (encoders.encode_text, "encode_text", tokens),
            (encoders.encode_image, "encode_image", images()),
        ):
            exact_batch = batch.double() if batch.is_floating_point() else batch
            truth = results(getattr(exact, method)(exact_batch, normalize=False), list(exact.parameters()))
            host = results(getattr(model, method)(batch, normalize=False), list(model.parameters()))
            ours = results(encode(model, batch), list(model.parameters()))
            assert ours.keys() == host.keys() and len(ours) > 30
            assert_within_budget(ours, host, truth, torch.float32)

    def test_autocast(self, one_seed: list[int]) -> None:
        model, exact = build("quickgelu"), double(build("quickgelu"))
        truth = results(exact.encode_text(prompts()), self.text_parameters(exact))
        with torch.autocast("cpu", torch.bfloat16):
            host = model.encode_text(prompts())
            ours = encoders.encode_text(model, prompts())
        assert ours.dtype == host.dtype
        parameters = self.text_parameters(model)
        assert_within_budget(results(ours, parameters), results(host, parameters), truth, torch.bfloat16)

    def test_images_that_require_a_gradient_get_it(self, one_seed: list[int]) -> None:
        model, exact = build("clip", layers="top3"), double(build("clip", layers="top3"))
        got, plain, truth = (images().to(t).requires_grad_() for t in (torch.float32, torch.float32, torch.float64))
        encoders.encode_image(model, got).sum().backward()
        model.encode_image(plain).sum().backward()
        exact.encode_image(truth).sum().backward()
        assert_within_budget({"dx": got.grad}, {"dx": plain.grad}, {"dx": truth.grad}, torch.float32)

    @pytest.mark.parametrize("method", ["encode_text", "encode_image"])
    def test_normalize(self, method: str) -> None:
        model = build("clip").eval()
        batch = prompts() if method == "encode_text" else images()
        got = getattr(encoders, method)(model, batch, normalize=True)
        torch.testing.assert_close(got, getattr(model, method)(batch, normalize=True), atol=2e-6, rtol=0)

    def test_merged(self) -> None:
        model = build("clip").eval()
        fastlora.merge(model)
        torch.testing.assert_close(encoders.encode_text(model, prompts()), model.encode_text(prompts()), atol=5e-6, rtol=0)

    @pytest.mark.parametrize("name", ["clip", "coca"])
    def test_checkpointed_blocks_draw_the_same_masks_again(self, name: str) -> None:
        model, tokens = build(name), model_prompts(name)
        plain = results(encoders.encode_text(model, tokens, seed=5), self.text_parameters(model))
        plain_image = results(encoders.encode_image(model, images(), seed=5), self.vision_parameters(model))
        model.set_grad_checkpointing(True)
        again = results(encoders.encode_text(model, tokens, seed=5), self.text_parameters(model))
        again_image = results(encoders.encode_image(model, images(), seed=5), self.vision_parameters(model))
        for one, other in ((plain, again), (plain_image, again_image)):
            for name in one:
                torch.testing.assert_close(one[name], other[name], atol=0, rtol=0)

    def test_two_forward_passes_before_a_backward(self) -> None:
        """Each keeps its own seed: the gradient of a sum is the sum of the gradients."""
        model, tokens = build("clip"), prompts()
        parameters = self.text_parameters(model)
        first, second = (results(encoders.encode_text(model, tokens, seed=s), parameters) for s in (1, 2))
        both = results(sum(encoders.encode_text(model, tokens, seed=s) for s in (1, 2)), parameters)
        for name in list(both)[1:]:
            torch.testing.assert_close(both[name], first[name] + second[name], atol=1e-5, rtol=1e-5)

    @staticmethod
    def text_parameters(model: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.requires_grad and "visual" not in name]

    @staticmethod
    def vision_parameters(model: nn.Module) -> list[nn.Parameter]:
        return [p for name, p in model.named_parameters() if p.requires_grad and "visual" in name]

    def text(self, model: nn.Module, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters = self.text_parameters(model)
        return results(model.encode_text(tokens), parameters), results(encoders.encode_text(model, tokens), parameters)

    def image(self, model: nn.Module, batch: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters, batch = self.vision_parameters(model), batch.to(next(model.parameters()).dtype)
        return results(model.encode_image(batch), parameters), results(encoders.encode_image(model, batch), parameters)


@pytest.mark.slow
def test_whole_vit_b_32(one_seed: list[int]) -> None:
    """One model of full size: its depth, its widths, the real vocabulary; two draws: one's largest error is luck."""
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    fastlora.patch(model)
    model.train()
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat.", "a photo of a golden retriever.", "a dog"])
    both = TestAgainstTheHost()
    draws: dict[str, list[tuple[dict[str, Tensor], ...]]] = {"text": [], "image": []}
    for _ in range(2):
        for parameter in lora_parameters(model):
            nn.init.normal_(parameter, std=0.02)
        exact = double(model)
        for tower, call, inputs in (("text", both.text, tokens), ("image", both.image, torch.randn(2, 3, 224, 224))):
            truth, _ = call(exact, inputs)
            host, ours = call(model, inputs)
            assert len(ours) == 25
            draws[tower].append((ours, host, truth))
    for found in draws.values():
        ours, hosts, truths = (list(results) for results in zip(*found, strict=True))
        assert_within_expected_budget(ours, hosts, truths, torch.float32)


class TestMasksAreKeyedByIdentity:
    @pytest.mark.parametrize("name", ["clip", "siglip", "coca"])
    def test_a_prompt_has_the_same_masks_in_any_batch(self, name: str) -> None:
        model, tokens = build(name, dropout=0.5), model_prompts(name)
        whole = encoders.encode_text(model, tokens, seed=SEED)
        chosen = torch.tensor([6, 2, 4])
        part = encoders.encode_text(model, tokens[chosen], seed=SEED, ids=chosen)
        torch.testing.assert_close(part, whole[chosen], atol=1e-5, rtol=1e-5)
        other = encoders.encode_text(model, tokens[chosen], seed=SEED)
        assert (other - whole[chosen]).abs().max() > 1e-2

    @pytest.mark.parametrize("name", ["clip", "siglip"])
    def test_an_image_has_the_same_masks_in_any_batch(self, name: str) -> None:
        model, batch = build(name, dropout=0.5), images()
        whole = encoders.encode_image(model, batch, seed=SEED)
        chosen = torch.tensor([3, 1])
        part = encoders.encode_image(model, batch[chosen], seed=SEED, ids=chosen)
        torch.testing.assert_close(part, whole[chosen], atol=1e-5, rtol=1e-5)
        assert (encoders.encode_image(model, batch[chosen], seed=SEED) - whole[chosen]).abs().max() > 1e-2

    def test_two_shards_give_the_gradient_of_the_whole(self) -> None:
        model, tokens = build("clip"), prompts()
        parameters = TestAgainstTheHost.text_parameters(model)
        whole = torch.autograd.grad(encoders.encode_text(model, tokens, seed=SEED).square().sum(), parameters)
        shards = [torch.arange(0, 4), torch.arange(4, 7)]
        features = [encoders.encode_text(model, tokens[ids], seed=SEED, ids=ids) for ids in shards]
        parts = [torch.autograd.grad(f.square().sum(), parameters) for f in features]
        for full, *halves in zip(whole, *parts, strict=True):
            torch.testing.assert_close(sum(halves), full, atol=1e-4, rtol=1e-4)

    def test_one_draw_for_each_forward_pass(self, one_seed: list[int]) -> None:
        model = build("clip")
        encoders.encode_text(model, prompts())
        assert len(one_seed) == 1
        encoders.encode_image(model, images())
        assert len(one_seed) == 2
        model.eval()
        encoders.encode_image(model, images())
        assert len(one_seed) == 2, "nothing drops out, nothing is drawn"

    def test_manual_seed_governs_the_draw(self) -> None:
        model = build("clip")
        first, second, third = ((torch.manual_seed(s), encoders.encode_text(model, prompts()))[1] for s in (1, 1, 2))
        assert torch.equal(first, second) and not torch.equal(first, third)


class TestSharedPrefix:
    def test_is_exact_without_dropout(self, one_seed: list[int]) -> None:
        for name in ("clip", "quickgelu", "custom-text-eos", "coca"):
            model, tokens = build(name, dropout=0.0), model_prompts(name)[[0, 1, 3, 4, 6]]
            parameters = TestAgainstTheHost.text_parameters(model)
            exact = double(model)
            truth = results(exact.encode_text(tokens, normalize=False), TestAgainstTheHost.text_parameters(exact))
            host = results(model.encode_text(tokens, normalize=False), parameters)
            encoder = encoders.TextEncoder(model, tokens, share_prefix=True)
            assert encoder._packed is not None and encoder._packed.sequences.prefix == 3
            assert_within_budget(results(encoder(), parameters), host, truth, torch.float32)

    def test_with_dropout_the_prefix_has_the_masks_of_prompt_0(self) -> None:
        """The same as whole prompts whose first rows carry prompt 0's identities."""
        model, tokens = build("clip", dropout=0.5), prompts()[[0, 1, 3, 4, 6]]
        tied = encoders.TextEncoder(model, tokens)
        packed = tied._packed
        assert packed is not None
        first = packed.positions < 3
        packed.rows[first] = packed.positions[first]
        shared = encoders.TextEncoder(model, tokens, share_prefix=True)
        parameters = TestAgainstTheHost.text_parameters(model)
        one, other = results(tied(SEED), parameters), results(shared(SEED), parameters)
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=2e-5, rtol=2e-5)

    def test_one_prompt_or_no_common_token_shares_nothing(self) -> None:
        model, tokens = build("clip", dropout=0.0), prompts()
        apart = tokens.clone()
        apart[0, 0] = 1
        for some in (tokens[:1], apart):
            encoder = encoders.TextEncoder(model, some, share_prefix=True)
            assert encoder._packed is not None and encoder._packed.sequences.prefix == 0
            torch.testing.assert_close(encoder(), model.encode_text(some), atol=1e-5, rtol=1e-5)

    def test_a_part_of_the_prompts_has_the_masks_of_the_whole(self) -> None:
        """As when prompts are sharded over processes: what all share is computed, not what this part shares."""
        model, tokens = build("clip", dropout=0.5), prompts()[[0, 1, 3, 4, 6]]
        tokens[3:, 3] = 5  # the last two share one token more
        whole = encoders.TextEncoder(model, tokens, share_prefix=True)(SEED)
        prefix = encoders.common_prefix(model, tokens)
        assert prefix == 3
        for part in (slice(0, 3), slice(3, 5), slice(4, 5)):
            ids = torch.arange(len(tokens))[part]
            mine = encoders.TextEncoder(model, tokens[part], ids=ids, share_prefix=prefix)(SEED)
            torch.testing.assert_close(mine, whole[part], atol=2e-5, rtol=2e-5)

    def test_a_prefix_that_is_not_shared_is_refused(self) -> None:
        with pytest.raises(ValueError, match="share_prefix=4, but these prompts share 3"):
            encoders.TextEncoder(build("clip"), prompts()[[0, 1, 3]], share_prefix=4)


class TestTextEncoder:
    @pytest.fixture
    def blocks_run(self, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
        run, real = [], encoders.text.run_block
        monkeypatch.setattr(encoders.text, "run_block", lambda block, *a: (run.append(block), real(block, *a))[1])
        return run

    def test_text_without_adapters_is_encoded_once(self, blocks_run: list[nn.Module]) -> None:
        model = build("clip", encoders=("vision",))
        encoder = encoders.TextEncoder(model, prompts())
        first, second = encoder(), encoder()
        assert len(blocks_run) == 3 and torch.equal(first, second) and not first.requires_grad
        torch.testing.assert_close(first, model.encode_text(prompts()), atol=1e-5, rtol=1e-5)

    def test_what_lies_below_the_lowest_adapter_runs_once(self, blocks_run: list[nn.Module]) -> None:
        model = build("clip", layers=(2,), dropout=0.0)
        encoder = encoders.TextEncoder(model, prompts())
        for _ in range(3):
            torch.testing.assert_close(encoder(), model.encode_text(prompts()), atol=1e-5, rtol=1e-5)
            with torch.no_grad():
                for parameter in lora_parameters(model):
                    parameter += 0.01
        assert len(blocks_run) == 2 + 3

    def test_a_changed_weight_below_is_noticed(self, blocks_run: list[nn.Module]) -> None:
        model = build("clip", layers=(2,), dropout=0.0)
        encoder = encoders.TextEncoder(model, prompts())
        before = encoder()
        with torch.no_grad():
            model.token_embedding.weight.mul_(1.5)
        after = encoder()
        assert (after - before).abs().max() > 1e-3
        torch.testing.assert_close(after, model.encode_text(prompts()), atol=1e-5, rtol=1e-5)
        model.load_state_dict({k: v + 0.01 for k, v in model.state_dict().items()})
        torch.testing.assert_close(encoder(), model.encode_text(prompts()), atol=1e-5, rtol=1e-5)

    def test_patching_unpatching_and_merging_later_are_noticed(self) -> None:
        model = build("clip", patched=False).eval()
        encoder = encoders.TextEncoder(model, prompts())

        def agrees() -> None:
            torch.testing.assert_close(encoder(), model.encode_text(prompts()), atol=1e-5, rtol=1e-5)

        agrees()
        fastlora.patch(model, rank=2)
        for parameter in lora_parameters(model):
            nn.init.normal_(parameter, std=0.1)
        agrees()
        fastlora.merge(model)
        agrees()
        fastlora.unpatch(model)
        agrees()

    def test_kept_rows_made_in_inference_mode_serve_training(self) -> None:
        model = build("clip", layers=(2,))
        encoder = encoders.TextEncoder(model, prompts())
        with torch.inference_mode():
            encoder()
        encoder().sum().backward()
        assert all(p.grad is not None for p in TestAgainstTheHost.text_parameters(model))

    def test_frozen_adapters_that_drop_out_are_not_kept(self) -> None:
        model = build("clip", dropout=0.5)
        for parameter in lora_parameters(model):
            parameter.requires_grad_(False)
        encoder = encoders.TextEncoder(model, prompts())
        assert not torch.equal(encoder(1), encoder(2))

    @pytest.mark.parametrize(
        ("tokens", "ids", "says"),
        [
            (torch.zeros(3), None, r"tokens must be integers \(n, L\), got torch.float32 \(3,\)"),
            (torch.zeros(3, 20, dtype=torch.long), torch.arange(2), r"ids must be \(3,\) integers"),
        ],
        ids=["tokens", "ids"],
    )
    def test_bad_input_is_named(self, tokens: Tensor, ids: Tensor | None, says: str) -> None:
        with pytest.raises(ValueError, match=says):
            encoders.encode_text(build("clip"), tokens, ids=ids)


def test_bad_image_ids_are_named() -> None:
    with pytest.raises(ValueError, match=r"ids must be \(5,\) integers"):
        encoders.encode_image(build("clip"), images(), ids=torch.arange(4))


class TestWhatIsKeptForBackward:
    @pytest.fixture
    def kept(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
        """Address -> bytes of every tensor saved for backward, counted once, through our own hooks as well."""
        saved: dict[int, int] = {}
        alive: list[Tensor] = []

        def count(tensor: Tensor) -> Tensor:
            if not (isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)):
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                alive.append(tensor)
            return tensor

        real = torch.autograd.graph.saved_tensors_hooks

        def through(pack: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
            return lambda tensor: None if (packed := pack(tensor)) is None else (count(tensor), packed)[1]

        monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", lambda p, u: real(through(p), u))
        with real(count, lambda t: t):
            yield saved

    @pytest.mark.parametrize("name", ["clip", "quickgelu"])
    def test_a_block_keeps_nine_inputs(self, name: str, kept: dict[int, int]) -> None:
        """x; q, k, v; x after attention; four of c_fc: no LayerNorm output, no activation; torch's attention its result too."""
        model = build(name, targets=("q", "k", "v"))
        tower = model.visual.transformer
        x = torch.randn(6 * 17, 64, requires_grad=True)
        step = encoders.blocks.Step(torch.tensor(1), None)
        kept.clear()
        y = encoders.blocks.run_block(tower.resblocks[0], x, encoders.packing.Sequences(((6, 17),), False), step)
        y.sum().backward()
        size = x.numel() * 4
        small = 6 * 17 * (12 + 4 * 2 + 4) * 4  # s; mean and deviation of two norms; logsumexp of four heads
        weights = {p.data_ptr() for p in model.parameters()}
        total = sum(nbytes for address, nbytes in kept.items() if address not in weights)
        inputs = 9 if cpu.available() else 10
        assert (inputs - 0.5) * size < total <= inputs * size + small + 16, total / size

    def test_nothing_is_kept_below_the_lowest_adapter(self, kept: dict[int, int]) -> None:
        model = build("clip", layers=(2,))
        visual = model.visual
        x = visual._embeds(images()).flatten(0, 1)
        kept.clear()
        step = encoders.blocks.Step(torch.tensor(1), None)
        for block in visual.transformer.resblocks[:2]:
            x = encoders.blocks.run_block(block, x, encoders.packing.Sequences(((5, 17),), False), step)
        assert not kept and not x.requires_grad

    def test_a_frozen_linear_keeps_no_input(self, kept: dict[int, int]) -> None:
        layer = nn.Linear(8, 8).requires_grad_(False)
        x = torch.randn(4, 8, requires_grad=True)
        kept.clear()
        layer(x * 1.0).sum()
        assert x.untyped_storage().nbytes() not in kept.values()


class TestWhatRunsWhole:
    def test_plan_says_what_is_done(self) -> None:
        says = {name: encoders.plan(MODELS[name]()) for name in MODELS}
        assert says["clip"].text.startswith("packed: each prompt ends with its pooled token")
        assert says["clip"].vision == "last block for the class token alone"
        assert "bidirectional" in says["siglip"].text and "reads all tokens" in says["siglip"].vision
        assert "one pad" in says["coca"].text and "reads all tokens" in says["coca"].vision

    @pytest.mark.parametrize(
        ("build_model", "text", "vision"),
        [
            (
                lambda: CLIP(32, {**VISION, "layers": (1, 1, 1, 1), "width": 16, "image_size": 64}, TEXT),
                "packed",
                "the host's own method: ModifiedResNet",
            ),
            (
                lambda: CLIP(32, {**VISION, "qk_norm": True}, {**TEXT, "scale_fc": True}),
                "the host's own method: its blocks are CustomResidualAttentionBlock",
                "the host's own method: its blocks are CustomResidualAttentionBlock",
            ),
            (
                lambda: CustomTextCLIP(32, VISION, {**TEXT, "pool_type": "none"}),
                "the host's own method: its pooling 'none' gives all tokens",
                "last block",
            ),
        ],
        ids=["resnet", "custom-blocks", "unpooled"],
    )
    def test_other_towers_run_their_own_method(self, build_model: Callable[[], nn.Module], text: str, vision: str) -> None:
        torch.manual_seed(0)
        model = build_model().eval()
        said = encoders.plan(model)
        assert said.text.startswith(text) and said.vision.startswith(vision), said
        size = getattr(model.visual, "image_size", 32)
        side = size if isinstance(size, int) else size[0]
        batch = torch.randn(2, 3, side, side)
        torch.testing.assert_close(encoders.encode_image(model, batch), model.encode_image(batch), atol=1e-5, rtol=1e-5)
        got = encoders.encode_text(model, prompts())
        torch.testing.assert_close(got, model.encode_text(prompts()), atol=1e-5, rtol=1e-5)

    def test_a_subclass_with_its_own_method_keeps_it(self) -> None:
        class Doubled(CLIP):
            def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
                return 2 * super().encode_text(text, normalize)

        model = Doubled(32, VISION, TEXT).eval()
        assert "encode_text of its own" in encoders.plan(model).text
        assert torch.equal(encoders.encode_text(model, prompts()), model.encode_text(prompts()))

    def test_a_hooked_block_runs_its_hook(self) -> None:
        model, seen = build("clip"), []
        model.transformer.resblocks[1].register_forward_hook(lambda *_: seen.append(1))
        assert "forward hook" in encoders.plan(model).text
        encoders.encode_text(model, prompts())
        assert seen

    @pytest.mark.parametrize("lengths", [(19, 5), (5, 6)], ids=["a prompt fills the context", "a pad inside a prompt"])
    def test_coca_prompts_that_do_not_fit_the_short_form(self, lengths: tuple[int, ...]) -> None:
        model = build("coca").eval()
        tokens = prompts(19, lengths)
        tokens[1, 2] = 0 if lengths[0] == 5 else tokens[1, 2]
        encoder = encoders.TextEncoder(model, tokens)
        assert encoder._packed is None
        assert torch.equal(encoder(), model.encode_text(tokens, normalize=False))

    def test_an_unknown_model_is_an_error(self) -> None:
        with pytest.raises(TypeError, match="know open_clip's CLIP, CustomTextCLIP and CoCa, not Linear"):
            encoders.encode_image(nn.Linear(2, 2), images())

    def test_no_prompts(self) -> None:
        model = build("clip").eval()
        assert encoders.encode_text(model, prompts()[:0]).shape == (0, 32)


class TestCast:
    def test_frozen_weights_change_and_adapters_do_not(self) -> None:
        model = build("clip")
        encoders.cast(model, torch.bfloat16)
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert {d for n, d in dtypes.items() if "lora" in n or n == "logit_scale"} == {torch.float32}
        assert {d for n, d in dtypes.items() if "lora" not in n and n != "logit_scale"} == {torch.bfloat16}
        assert model.attn_mask.dtype == torch.bfloat16
        encoders.encode_text(model, prompts()).float().sum().backward()
        assert {p.grad.dtype for p in TestAgainstTheHost.text_parameters(model)} == {torch.float32}

    def test_norms_that_compute_in_fp32_keep_their_weights(self) -> None:
        model = CLIP(32, VISION, TEXT, cast_dtype=torch.bfloat16)
        fastlora.patch(model)
        encoders.cast(model, torch.bfloat16)
        assert model.ln_final.weight.dtype == torch.float32
        torch.testing.assert_close(encoders.encode_text(model, prompts()), model.encode_text(prompts()), atol=2e-2, rtol=2e-2)

    def test_other_dtypes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="dtype must be"):
            encoders.cast(build("clip"), torch.int8)
