"""The mask: the same bits from Triton and from PyTorch, at the right rate, independent where it must be, blind to packing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl

from fastlora import cpu, rng, thin
from fastlora.kernels.dropout import drop, keep_words, load_key, load_row_ids
from kernels_support import DEVICE

SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


@triton.jit(do_not_specialize=["site"])
def keep_kernel(  # type: ignore[no-untyped-def]
    out_ptr, seed_ptr, rows_ptr, M, K, site, group,
    J: tl.constexpr, PLANES: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [M, K] = 1 where the mask keeps, else 0."""
    k0, k1 = load_key(seed_ptr, site)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = load_row_ids(rows_ptr, offs_m, M)
    for column in range(0, K, COLUMNS):
        words = keep_words(k0, k1, tl.cast(group, tl.int32), ids, column, J, PLANES, COLUMNS)
        kept = drop(tl.full((BLOCK_M, COLUMNS), 1.0, tl.float32), words)
        offs_k = column + tl.arange(0, COLUMNS)
        mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        tl.store(out_ptr + offs_m[:, None] * K + offs_k[None, :], kept, mask=mask)


def kernel_mask(seed: torch.Tensor, site: int, group: int, rows: torch.Tensor | None, m: int, k: int, p: float) -> torch.Tensor:
    out = torch.full((m, k), float("nan"), device=DEVICE)
    j, planes = rng.bit_planes(p)
    ids = None if rows is None else rows.to(DEVICE)
    keep_kernel[(triton.cdiv(m, 16),)](
        out, seed.to(DEVICE), ids, m, k, site, group, J=j, PLANES=planes, BLOCK_M=16, COLUMNS=256 if p == 0.5 else 128
    )
    return out.cpu()


def torch_mask(seed: torch.Tensor, site: int, group: int, rows: torch.Tensor, k: int, p: float) -> torch.Tensor:
    return rng.keep_mask(seed, site, group, rows, k, p)


@pytest.mark.parametrize("p", [0.25, 0.5, 0.1, 0.9, 1 / 256, 255 / 256])
def test_kernel_draws_the_bits_of_rng(p: float) -> None:
    # K is no multiple of 8 or 128; identities repeat, are negative and pass 2**32; site, seed and group use high bits
    rows = torch.tensor([0, 1, 2, 1, 77, 2**31, 2**32 + 5, -1, 2**62 + 3, *range(1000, 1014)])
    got = kernel_mask(SEED, 0xFFFF_FFF, 2, rows, len(rows), 301, p)
    assert torch.equal(got == 1, torch_mask(SEED, 0xFFFF_FFF, 2, rows, 301, p))


def test_rows_default_to_their_number() -> None:
    assert torch.equal(kernel_mask(SEED, 1, 0, None, 19, 133, 0.25) == 1, torch_mask(SEED, 1, 0, torch.arange(19), 133, 0.25))


@pytest.mark.parametrize("p", [0.25, 0.5, 0.1, 0.02])
def test_rate_is_the_rounded_probability(p: float) -> None:
    kept = rng.keep_mask(SEED, 3, 0, torch.arange(2000), 512, p)
    q = rng.drop_rate(p)
    assert abs(q - p) <= 1 / 512
    sigma = math.sqrt(q * (1 - q) / kept.numel())
    assert abs((1 - kept.double().mean()) - q) < 5 * sigma
    # every column and every row on its own too: a bad bit of a word would hide in the mean
    for dim in (0, 1):
        share = 1 - kept.double().mean(dim)
        assert (share - q).abs().max() < 6 * math.sqrt(q * (1 - q) / kept.shape[dim])


def test_masks_of_groups_sites_seeds_rows_and_columns_are_independent() -> None:
    rows, p = torch.arange(1000), 0.25
    base = rng.keep_mask(SEED, 0, 0, rows, 512, p).double()
    others = {
        "group": rng.keep_mask(SEED, 0, 1, rows, 512, p),
        "site": rng.keep_mask(SEED, 1, 0, rows, 512, p),
        "seed low": rng.keep_mask(SEED + 1, 0, 0, rows, 512, p),
        "seed high": rng.keep_mask(SEED + 2**32, 0, 0, rows, 512, p),
        "next row": rng.keep_mask(SEED, 0, 0, rows + 1, 512, p),
        "next call": base.roll(128, 1) != 0,
        "next word": base.roll(32, 1) != 0,
        "next column": base.roll(1, 1) != 0,
    }
    variance = p * (1 - p)
    for name, other in others.items():
        correlation = float(((base - (1 - p)) * (other.double() - (1 - p))).mean()) / variance
        assert abs(correlation) < 5 / math.sqrt(base.numel()), f"{name}: correlation {correlation:.1e}"


def test_mask_depends_on_nothing_but_its_key() -> None:
    rows = torch.randperm(500)[:60] * 77
    whole = rng.keep_mask(SEED, 4, 1, rows, 200, 0.25)
    order = torch.randperm(60)
    assert torch.equal(rng.keep_mask(SEED, 4, 1, rows[order], 200, 0.25), whole[order])
    shards = [rng.keep_mask(SEED, 4, 1, part, 200, 0.25) for part in rows.split(17)]
    assert torch.equal(torch.cat(shards), whole)
    # a wider matrix has the same first columns: no counter is made of row * K
    assert torch.equal(rng.keep_mask(SEED, 4, 1, rows, 333, 0.25)[:, :200], whole)


def written_out(site: int, group: int, row: int, columns: int) -> torch.Tensor:
    """Where p = 0.5 keeps, by Philox and the order of its bits written out once more, with Python's own integers."""

    def philox(c: list[int], k: list[int]) -> list[int]:
        for _ in range(7):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    key = [int(SEED) & 0xFFFFFFFF, (int(SEED) >> 32) ^ ((site * 0x9E3779B9) & 0xFFFFFFFF)]
    bit_of = [j + 8 * i for j in range(8) for i in range(4)]  # of a word's 32 columns, in order
    kept = []
    for column in range(columns):
        word = philox([row, column // 128, group, 0], key)[column % 128 // 32]
        kept.append(bool(word >> bit_of[column % 32] & 1))  # u < 1 drops where the bit is 0
    return torch.tensor(kept)


def test_bits_are_those_of_philox_4x32_7_in_the_stated_order() -> None:
    kept, rows = written_out(6, 2, 9, 256), torch.tensor([9])
    assert torch.equal(rng.keep_mask(SEED, 6, 2, rows, 256, 0.5)[0], kept)
    assert torch.equal(kernel_mask(SEED, 6, 2, rows, 1, 256, 0.5)[0] == 1, kept)
    decisions = rng.drop_bytes(SEED, 6, (2,), rows, 256, 0.5)[0, 0]
    assert torch.equal(decisions[:, None] >> torch.arange(8) & 1 == 0, kept.view(-1, 8))


@pytest.mark.skipif(not cpu.available(), reason="the package was installed without a C compiler")
def test_the_cpu_kernels_take_the_same_bits_in_the_same_order(lanes: int) -> None:
    x = torch.eye(256)
    s = thin.shrink(x, torch.ones(1, 1, 256), SEED, torch.full((256,), 9), 0.5, 6, [2])
    assert torch.equal(s[:, 0] != 0, written_out(6, 2, 9, 256))


def test_scale_keeps_the_mean() -> None:
    for p, dtype in itertools.product((0.25, 0.1), (torch.float32, torch.float16)):
        multiplier = rng.keep_multiplier(SEED, 0, 0, torch.arange(3), 100, p, dtype)
        kept = rng.keep_mask(SEED, 0, 0, torch.arange(3), 100, p)
        assert torch.equal(multiplier, torch.where(kept, 1 / (1 - rng.drop_rate(p)), 0.0).to(dtype))
