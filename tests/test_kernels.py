"""The Triton kernels against the float64 truth, eager's error as the budget: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastlora import eager
from fastlora.kernels import compile as compiler
from fastlora.kernels import lora_linear as kernels
from fastlora.kernels import tiles
from fastlora.kernels.candidates import FORMS, candidates
from fastlora.kernels.launch import recording
from fastlora.testing import poisoned
from kernels_support import (
    DEVICE,
    ONE_PASS,
    PLANS,
    TWO_PASSES,
    Case,
    check,
    make,
    run,
)

# bfloat16 only on a GPU: the interpreter's tl.dot multiplies its raw bits.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
CASES = {
    "packed-odd": Case(),
    "no-dropout": Case(dropout=0.0),
    "k-only": Case(active=(False, True, False), dropout=0.5, m=70, layout="columns"),
    "q-and-v": Case(active=(True, False, True), masters=False, layout="transposed", n=33, r=16, bias=False),
    "one-group-full-tiles": Case(m=64, n=64, k=256, r=17, active=(True,), shuffled_rows=False, dropout=0.1),
    "q-of-three": Case(active=(True,), keys=(2,), n=5, k=3, r=1, m=3),
    "four-groups": Case(m=33, n=8, k=16, r=2, active=(True, True, False, True), keys=(3, 1, 0, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_forward_and_backward_within_budget(plan: tiles.Plan, case: Case, dtype: torch.dtype) -> None:
    check(make(case, dtype), dtype, plan)


def test_the_dispatcher_knows_which_ranks_have_rows() -> None:
    for precision, largest in tiles.MAX_RANK.items():
        for arch in tiles.ARCHITECTURES:
            assert max(row.max_rank for row in tiles.TABLE if row.precision == precision and arch in row.archs) == largest


@pytest.mark.parametrize("rank", [33, 100])
def test_large_ranks(rank: int) -> None:
    check(make(Case(m=20, n=24, k=40, r=rank, active=(True, True)), torch.float32), torch.float32, TWO_PASSES)


def test_the_tables_own_rows() -> None:
    for dropout in (0.0, 0.25):
        check(make(Case(m=19, n=24, k=140, dropout=dropout), torch.float16), torch.float16)


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.builds(
        Case,
        m=st.integers(1, 70),
        n=st.integers(1, 50),
        k=st.integers(1, 150),
        r=st.integers(1, 20),
        active=st.lists(st.booleans(), min_size=1, max_size=3).map(tuple).filter(any),
        dropout=st.sampled_from([0.0, 0.25, 0.3]),
        bias=st.booleans(),
        layout=st.sampled_from(["plain", "columns", "transposed"]),
        masters=st.booleans(),
        shuffled_rows=st.booleans(),
    ),
    st.sampled_from(sorted(PLANS)),
)
def test_any_shape(case: Case, plan: str) -> None:
    check(make(case, torch.float32), torch.float32, PLANS[plan])


@pytest.mark.parametrize("plan", [ONE_PASS, TWO_PASSES], ids=["one-pass", "two-passes"])
def test_only_wanted_gradients_are_made_and_each_is_the_same(plan: tiles.Plan) -> None:
    inputs = make(Case(m=40, n=16, k=24, active=(True, True)), torch.float32)
    every = run(kernels, inputs, plan=plan)
    for needs in itertools.product((True, False), repeat=3):
        with poisoned():
            got = run(kernels, inputs, needs, plan=plan)
        for name, need in zip(("dx", "da", "db"), needs, strict=True):
            assert (got[name] is not None) == need, (name, needs)
            if need:
                # another form may sum in another order
                torch.testing.assert_close(got[name], every[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", [ONE_PASS, TWO_PASSES], ids=["one-pass", "two-passes"])
def test_same_bits_on_each_run(plan: tiles.Plan) -> None:
    inputs = make(Case(m=165, n=20, k=20, active=(True,)), torch.float16)
    first, second = run(kernels, inputs, plan=plan), run(kernels, inputs, plan=plan)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_result_of_a_row_does_not_depend_on_its_place() -> None:
    inputs = make(Case(m=50, shuffled_rows=True), torch.float32)
    y, _ = kernels.forward(inputs.x, inputs.weight, inputs.bias, *inputs.arguments(), plan=ONE_PASS)
    order = torch.randperm(50)[:20].to(DEVICE)
    assert inputs.rows is not None
    rows = inputs.rows[order]
    part, _ = kernels.forward(
        inputs.x[order], inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.case.spec, inputs.seed, rows, plan=ONE_PASS
    )
    torch.testing.assert_close(part, y[order], rtol=1e-5, atol=1e-5)


def test_expanded_dy() -> None:
    """sum() gives a dy of stride 0."""
    inputs = make(Case(m=20), torch.float32)
    inputs.dy = torch.ones((), device=DEVICE).expand(inputs.dy.shape)
    check(inputs, torch.float32, ONE_PASS)


@pytest.mark.parametrize("case", [Case(m=0), Case(m=0, dropout=0.0, active=(True,))], ids=["packed", "one"])
def test_no_rows(case: Case) -> None:
    inputs = make(case, torch.float32)
    with poisoned():
        got, want = run(kernels, inputs), run(eager, inputs)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("bias", [True, False])
def test_no_columns(bias: bool) -> None:
    """Of x: the bias is all that is left."""
    inputs = make(Case(m=20, bias=bias), torch.float32)
    inputs = dataclasses.replace(inputs, x=inputs.x[:, :0], weight=inputs.weight[:, :0], a=inputs.a[..., :0])
    with poisoned():
        got, want = run(kernels, inputs), run(eager, inputs)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_inputs_are_left_alone() -> None:
    inputs = make(Case(m=20), torch.float32)
    before = {n: v.clone() for n, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    run(kernels, inputs, plan=ONE_PASS)
    for name, value in before.items():
        assert torch.equal(getattr(inputs, name), value), name


def test_a_group_without_adapter_is_a_plain_product() -> None:
    inputs = make(Case(active=(True, False, True)), torch.float32)
    with recording() as launches:
        run(kernels, inputs, plan=ONE_PASS)
    forward = [one.arguments for one in launches if one.kernel.__name__ == "forward_kernel"]
    assert [(one["POSITIONS"], one["HAS_LORA"]) for one in forward] == [((0, 2), True), ((1,), False)]
    backward = next(one.arguments for one in launches if one.kernel.__name__ == "backward_kernel")
    assert (backward["POSITIONS"], backward["PLAIN"]) == ((0, 2), (1,))


def test_the_default_recipe_is_one_launch_forward_besides_packing() -> None:
    """Packed q, k, v, rank 2, dropout 0.25, half precision: what kernels/README.md lists is what is launched."""
    inputs = make(Case(m=40, n=24, k=48, r=2, dropout=0.25), torch.float16)
    with recording() as launches:
        kernels.forward(inputs.x, inputs.weight, inputs.bias, *inputs.arguments())
    assert [one.kernel.__name__ for one in launches] == ["pack_kernel", "forward_kernel"]
    for config, listed, _ in compiler.launch_table(compiler.configurations()):
        if "half r16" in config or "half r32" in config:
            assert listed == "pack, forward", config


@pytest.mark.parametrize("rows", [1600, 6304, 50432])
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_programs_of_one_launch_fill_the_gpu(arch: int, rows: int) -> None:
    """The last wave of programs leaves at most three in ten multiprocessors idle, s computed by several included."""
    (config,) = [c for c in compiler.configurations((arch,)) if str(c) == f"sm_{arch} bfloat16 half r16 p=0.25"]
    forward, _ = compiler.launches(dataclasses.replace(config, rows=rows))
    one, processors = forward[-1], compiler.MULTIPROCESSORS[arch]
    assert one.kernel.__name__ == "forward_kernel"
    waves = -(-one.programs // processors)
    assert one.programs / (waves * processors) >= 0.7


def test_every_tile_of_columns_is_taken_once_for_any_span() -> None:
    inputs = make(Case(m=40, n=150, k=40, active=(True, True)), torch.float32)
    results = []
    for processors in (1, 4, 5, 10_000):
        with tiles.assuming(processors), poisoned():
            results.append(run(kernels, inputs, plan=ONE_PASS))
    for other in results[1:]:
        assert torch.equal(other["y"], results[0]["y"]) and torch.equal(other["s"], results[0]["s"])


def test_packed_adapters_are_used_as_they_are() -> None:
    aligned = make(Case(n=16, k=32, r=16, masters=False), torch.float16)
    masters = make(Case(n=16, k=32, r=16, masters=True), torch.float16)
    for inputs, packs in ((aligned, 0), (masters, 2)):
        with recording() as launches:
            run(kernels, inputs, plan=ONE_PASS)
        assert sum(one.kernel.__name__ == "pack_kernel" for one in launches) == packs


def test_table_has_a_row_for_every_class() -> None:
    classes = itertools.product(tiles.ARCHITECTURES, ("half", "tf32", "ieee"), (16, 32, 64, 128), (False, True))
    for arch, precision, rank, dropout in classes:
        if rank > tiles.MAX_RANK[precision]:
            with pytest.raises(ValueError, match="has no kernel"):
                tiles.choose(tiles.Call(arch, precision, rank, dropout))
            continue
        plan = tiles.choose(tiles.Call(arch, precision, rank, dropout))
        if dropout:
            assert plan.shrink.k % 128 == plan.backward.k % 128 == plan.da.k % 128 == 0


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
@pytest.mark.parametrize("dropout", [False, True])
def test_candidates_are_the_tables_plan_and_its_other_forms_each_once(dropout: bool, arch: int) -> None:
    call = tiles.Call(arch, "half", 16, dropout)
    for direction, forms in FORMS.items():
        plans = candidates(call, direction)
        assert plans[0] == tiles.choose(call) and len(set(plans)) == len(plans) <= 12
        for flags in itertools.product((False, True), repeat=len(forms)):
            assert dataclasses.replace(plans[0], **dict(zip(forms, flags, strict=True))) in plans


@contextlib.contextmanager
def far_apart(tensor: torch.Tensor, axis: int) -> Iterator[torch.Tensor]:
    """Its values, those along `axis` so far apart that the last lie past 2**31 elements, in an unwritten mapping of memory."""
    stride = 2**31 // 257
    assert stride < kernels._MAX_STRIDE < 2**31 < (tensor.shape[axis] - 15) * stride
    before = 2**31  # a wrapped offset then reads a zero, where it would end the process
    size = before + tensor.shape[axis] * stride + tensor.shape[1 - axis]
    with tempfile.TemporaryFile() as file:
        file.truncate(tensor.element_size() * size)  # a hole: what is not written takes no space
        storage = torch.from_file(f"/proc/self/fd/{file.fileno()}", shared=True, size=size, dtype=tensor.dtype)
        yield storage.as_strided(tensor.shape, (stride, 1) if axis == 0 else (1, stride), before).copy_(tensor)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the test below uses real memory")
@pytest.mark.parametrize("plan", [ONE_PASS, TWO_PASSES], ids=["one-pass", "two-passes"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("name", ["x", "weight", "dy"])
def test_offsets_past_two_to_the_31_elements(name: str, axis: int, plan: tiles.Plan) -> None:
    # the last tile of the far axis starts past 2**31: tiles of M and N are 32 wide, those of K 128
    far = {("x", 0): "m", ("dy", 0): "m", ("weight", 0): "n", ("dy", 1): "n", ("x", 1): "k", ("weight", 1): "k"}[name, axis]
    sizes = {"m": 20, "n": 20, "k": 24, far: 400 if far == "k" else 300}
    inputs = make(Case(**sizes, active=(True,), dropout=0.0), torch.float16)
    want = run(kernels, inputs, plan=plan)
    with far_apart(getattr(inputs, name), axis) as tensor:
        got = run(kernels, dataclasses.replace(inputs, **{name: tensor}), plan=plan)
    for result, value in want.items():
        assert torch.equal(got[result], value), result


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    m, k = 2**31 // 768 + 4096, 768
    case = Case(m=m, n=64, k=k, r=2, active=(True,), masters=True)
    x = torch.randn(4096, k, device=DEVICE, dtype=torch.bfloat16).repeat(m // 4096 + 1, 1)[:m]
    inputs = dataclasses.replace(make(dataclasses.replace(case, m=1), torch.bfloat16), case=case)
    a, b, spec, seed, _ = inputs.arguments()
    rows = torch.arange(m, device=DEVICE)
    y, s = kernels.forward(x, inputs.weight, None, a, b, spec, seed, rows)
    tail = slice(m - 3000, m)
    want, want_s = kernels.forward(x[tail], inputs.weight, None, a, b, spec, seed, rows[tail])
    torch.testing.assert_close(y[tail], want)
    dx, _, _ = kernels.backward(y, x, s, inputs.weight, a, b, spec, seed, rows, (True, True, True))
    want_dx, _, _ = kernels.backward(want, x[tail], want_s, inputs.weight, a, b, spec, seed, rows[tail], (True, True, True))
    torch.testing.assert_close(dx[tail], want_dx)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_soak_over_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    case = Case(
        m=int(torch.randint(1, 3000, (), generator=generator)), n=pick(64, 100, 512, 768), k=pick(64, 100, 512, 768, 1001),
        r=pick(1, 2, 16, 17, 64), active=pick((True,), (True, True, True), (True, False, True)),
        dropout=pick(0.0, 0.25, 0.1), layout=pick("plain", "columns", "transposed"), masters=pick(True, False),
    )  # fmt: skip
    dtype = pick(torch.float16, torch.bfloat16, torch.float32)
    check(make(case, dtype, seed=seed), dtype)
