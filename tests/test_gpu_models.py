"""The checks of attention and of a captured step, at tiny sizes without a GPU: green, and red for each fault put in."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import attention_support
from attention_support import NO_WHEEL, stand_in
from fastlora.encoders import attention as ours
from gpu import step_check
from gpu.attention_checks import attention, missing
from gpu.step_check import captured_step

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"prompts": 13, "images": 3, "tokens": 20, "prefix": 3, "heads": (2, 2), "head": 8}


class TestAttention:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("kernel", ["cpu", "sdpa"])
    def test_what_a_cpu_has(self, kernel: str, dtype: torch.dtype) -> None:
        facts = attention(CPU, kernel, dtype, **SMALL | {"heads": (2, 3)})
        assert len(facts["shares"]) == 6 and all(0 < share <= 1 for share in facts["shares"].values()) and json.dumps(facts)

    @pytest.mark.parametrize("kernel", ["varlen", "xformers"])
    def test_stand_ins(self, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in(monkeypatch, kernel)
        assert attention(CPU, kernel, torch.float32, **SMALL)["kernel"] == kernel

    @pytest.mark.parametrize(("fault", "where"), [("not causal", "prompts"), ("top left", "prompts with a shared prefix")])
    def test_a_wrong_window(self, fault: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The diagonal at the top left is right where keys are as many as queries: not behind a shared prefix."""
        stand_in(monkeypatch, "varlen")
        right = attention_support.one_sequence

        def one_sequence(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
            if causal and fault == "top left":
                return torch.cat([right(q[i : i + 1], k[: i + 1], v[: i + 1], False) for i in range(len(q))])
            return right(q, k, v, False)

        monkeypatch.setattr(attention_support, "one_sequence", one_sequence)
        with pytest.raises(AssertionError, match=rf"varlen attention in torch\.float32 is wrong over {where}: y: got"):
            attention(CPU, "varlen", torch.float32, **SMALL)

    @pytest.mark.parametrize(("fault", "where"), [("not causal", "prompts"), ("top left", "prompts with a shared prefix")])
    def test_a_wrong_mask(self, fault: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same faults in what xformers is handed."""
        stand_in(monkeypatch, "xformers")
        masks = pytest.importorskip("xformers.ops.fmha.attn_bias", reason=NO_WHEEL)

        def wrong(self: Any) -> Any:
            return self if fault == "not causal" else self.make_causal()

        monkeypatch.setattr(masks.BlockDiagonalMask, "make_causal_from_bottomright", wrong)
        with pytest.raises(AssertionError, match=rf"xformers attention in torch\.float32 is wrong over {where}: y: got"):
            attention(CPU, "xformers", torch.float32, **SMALL)

    def test_a_wrong_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of v alone, behind a forward that is right."""
        stand_in(monkeypatch, "varlen")
        right = ours._varlen

        def varlen(q: Tensor, kv: Tensor, *rest: Any) -> Tensor:
            k, v = kv.chunk(2, 1)
            return right(q, torch.cat([k, 1.01 * v - (0.01 * v).detach()], 1), *rest)

        monkeypatch.setattr(ours, "_varlen", varlen)
        with pytest.raises(AssertionError, match="is wrong over prompts: dv: got"):
            attention(CPU, "varlen", torch.float32, **SMALL)

    def test_a_kernel_that_is_not_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stand_in(monkeypatch, "varlen")
        with pytest.raises(AssertionError, match="varlen attention was never asked over prompts"):
            attention(CPU, "varlen", torch.float32, **SMALL | {"head": 6})

    def test_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert missing("xformers", CPU) == "xformers needs a GPU"
        gpu = torch.device("cuda", 0)
        assert missing("varlen", gpu) is None
        for runs, words in ((True, None), (False, "xformers refuses this GPU: it was built for another CUDA than torch 2")):
            monkeypatch.setattr(ours, "_xformers_runs", lambda device, dtype, runs=runs: runs)
            found = missing("xformers", gpu)
            assert found is None if words is None else str(found).startswith(words)
        monkeypatch.setattr("gpu.attention_checks._MODULES", {"xformers": "not_here.ops"})
        assert missing("xformers", gpu) == "not_here.ops is not installed"


class TestCapturedStep:
    def test_the_step_called_again(self) -> None:
        facts = captured_step(CPU, steps=3, batch=2)
        assert facts["same_bits"] and facts["share"] <= 1 and len(facts["losses"]) == 3 and json.dumps(facts)

    def test_a_seed_that_was_captured_by_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first step is right, the others draw its mask again."""
        right = step_check.graphed

        def graphed(step: Any, inputs: Any, capture: Any) -> Any:
            run, first = right(step, inputs, capture), inputs.seed.clone()

            def engine(again: Any) -> None:
                again.seed.copy_(first)
                run(again)

            return engine

        monkeypatch.setattr(step_check, "graphed", graphed)
        with pytest.raises(AssertionError, match=r"3 captured steps in torch\.float32 do not have the losses of the eager"):
            captured_step(CPU, steps=3, batch=2)
