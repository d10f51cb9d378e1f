"""The tables of what is expected on an H100, beside what was measured there: one block of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from expected import Expected, change, layer, layers, product, step, steps
from expected.measured import Rows, case_of, gpu_rows
from expected.targets import targets
from fastlora.bench.rows import Row
from fastlora.bench.table import NONE, Table
from shapes import Case

COMPILED = "torch.compile(textbook)"
SHORT = [name for name in layers.CONTESTANTS if name != COMPILED]
CLASSES = (10, 100, 1000)
ONE, TWO = {"one_pass_forward": True}, {"one_pass_forward": False}
FUSED, APART = {"one_pass_backward": True, "da_in_epilogue": False}, {"one_pass_backward": False, "da_in_epilogue": False}
IN_EPILOGUE = {"one_pass_backward": True, "da_in_epilogue": True}
# (phase, tile of its large product, forms) as benchmarks/tune.py changes them; no tile: the row as it stands
CHANGES: tuple[tuple[str, tuple[int, ...], dict[str, bool]], ...] = (
    ("forward", (), {}),
    ("forward", (128, 256, 64, 8, 3), TWO),
    *(("forward", tile, ONE) for tile in (
        (128, 128, 64, 8, 4), (128, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 256, 128, 8, 2), (128, 128, 128, 8, 3),
        (64, 256, 128, 8, 2), (64, 128, 128, 4, 3))),
    ("backward", (), {}),
    *(("backward", (128, 64, k, 8, 3), form) for k in (128, 256) for form in (FUSED, IN_EPILOGUE, APART)),
    *(("backward", tile, FUSED) for tile in (
        (128, 32, 128, 8, 4), (128, 128, 128, 8, 2), (64, 64, 256, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 8, 3),
        (128, 64, 256, 8, 2))),
)  # fmt: skip


def _text(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    return NONE if value is None else f"{value / scale:,.{digits}f}"


def _pair(expected: float, measured: float | None, digits: int = 0, scale: float = 1.0) -> tuple[str, str, str]:
    """Predicted, measured, measured over predicted."""
    part = NONE if measured is None else f"{measured / expected:.2f}"
    return _text(expected, digits, scale), _text(measured, digits, scale), part


def _over(rows: Rows, cases: Sequence[Case]) -> str:
    """A line for each case: the floor in microseconds, then each contestant over it, predicted / measured."""
    cells = []
    for case in cases:
        floor, floor_measured = layer(case, "frozen").both, rows.layer(case, "frozen")
        line = [str(case.k), f"{case.m}", f"{case.rank}", f"{case.dropout:g}", f"{floor:.0f} / {_text(floor_measured)}"]
        for name in SHORT[1:]:
            time = rows.layer(case, name)
            ratio = None if time is None or floor_measured is None else time / floor_measured
            line.append(f"{layer(case, name).both / floor:.2f} / {_text(ratio, 2)}")
        cells.append(tuple(line))
    return Table("", ("K", "rows", "rank", "p", "frozen, µs", *SHORT[1:]), cells).markdown()


def _lines(what: Sequence[tuple[str, Expected, float | None]], unit: str, scale: float = 1.0) -> str:
    """what | predicted | arithmetic | measured | measured over predicted."""
    cells = []
    for name, expected, measured in what:
        predicted, found, part = _pair(expected.both, measured, 0 if scale == 1 else 1, scale)
        cells.append((name, expected.arithmetic, predicted, found, part))
    return Table("", ("what", "arithmetic", f"predicted, {unit}", "measured", "ratio"), cells, text=2).markdown()


def _arithmetic(rows: Rows) -> str:
    case = case_of(50432, 768)
    return _lines([(name, layer(case, name), rows.layer(case, name)) for name in SHORT], "µs")


def _steps(rows: Rows, classes: int) -> str:
    cells = []
    for name in steps.CONTESTANTS:
        as_written, graph = (step(classes, name, engine) for engine in ("as written", "graph"))
        times = [
            _pair(e.both, rows.step(classes, name, kind), 1, 1e3) for e, kind in ((as_written, "as written"), (graph, "graph"))
        ]
        peak = _pair(graph.peak, rows.peak(classes, name), 2, 2**30)
        cells.append((name, graph.arithmetic, *times[0], *times[1], *peak))
    heads = (
        "method",
        "by graph",
        "as written, ms",
        "measured",
        "ratio",
        "graph, ms",
        "measured",
        "ratio",
        "peak, GiB",
        "measured",
        "ratio",
    )
    return Table("", heads, cells, text=2).markdown()


def _blocks() -> str:
    """What one block is made of, in microseconds."""
    cells = []
    for name in steps.CONTESTANTS:
        parts = []
        for tower in steps.towers(1000, name):
            work = steps.block(tower, name)
            parts.append(f"{tower.tokens} rows: " + " + ".join(f"{k} {w.busy:.0f}" for k, w in work.items()))
        cells.append((name, *parts))
    return Table("", ("method", "a block of the image tower", "of the text tower, 1000 classes"), cells, text=3).markdown()


def words(phase: str, sizes: tuple[int, ...], forms: dict[str, bool]) -> str:
    """A change as benchmarks/tune.py calls it."""
    if not sizes:
        return "as it stands"
    m, n, k, warps, stages = sizes
    return f"{phase} {m}x{n}x{k} {warps}w {stages}s, " + ", ".join(f"{name}={value}" for name, value in forms.items())


def _changes(rows: Rows) -> str:
    cells = []
    for phase, sizes, forms in CHANGES:
        pairs: list[str] = []
        for dropout in (0.25, 0.0):
            case = case_of(50432, 768, dropout=dropout)
            expected = change(case, phase, phase if sizes else "", sizes, **forms)
            pairs += _pair(expected.both, rows.change(case, phase, words(phase, sizes, forms)))
            if dropout:
                arithmetic = expected.arithmetic
        cells.append((f"{phase}: {words(phase, sizes, forms).removeprefix(phase + ' ')}", arithmetic, *pairs))
    heads = ("change", "at p = 0.25", "p = 0.25, µs", "measured", "ratio", "p = 0, µs", "measured", "ratio")
    return Table("", heads, cells, text=2).markdown()


def _products(rows: Rows) -> str:
    cells = []
    for d in (768, 1024):
        for m in (50432, 6304):
            for name, k, n in (("x Wᵀ", d, 3 * d), ("dy W", 3 * d, d)):
                flops = 2e-6 * m * k * n
                by = [product(kind, m, k, n) for kind in ("cuBLAS", "Triton")]
                found = [rows.product(name, m, k, n, kind) for kind in ("cuBLAS", "Triton")]
                share = None if found[0] is None or found[1] is None else found[0] / found[1]
                line = [f"{name}, {m} x {k} by {n}", by[0].arithmetic]
                for expected, time in zip(by, found, strict=True):
                    line += _pair(expected.both, time)
                line += [f"{flops / by[0].both:.0f} / {_text(None if found[0] is None else flops / found[0])}"]
                cells.append((*line, f"{by[0].both / by[1].both:.2f} / {_text(share, 2)}"))
    heads = (
        "product",
        "cuBLAS",
        "cuBLAS, µs",
        "measured",
        "ratio",
        "Triton, µs",
        "measured",
        "ratio",
        "cuBLAS, TFLOP/s",
        "Triton's share",
    )
    return Table("", heads, cells, text=2).markdown()


def _compiled(rows: Rows) -> str:
    cases = [case_of(m, 768, 16, p) for m in (50432, 6304) for p in (0.25, 0.0)]
    what = [
        (f"layer, {c.m} rows, p = {c.dropout:g}: {layer(c, COMPILED).both / layer(c, 'frozen').both:.2f} × frozen",
         layer(c, COMPILED), rows.layer(c, COMPILED)) for c in cases
    ]  # fmt: skip
    # of a step the trainee is the textbook, and its engine compiles it
    whole = [(f"step, {n} classes", step(n, "textbook", "compile"), rows.step(n, "textbook", "compile")) for n in CLASSES]
    return _lines(what, "µs") + "\n\n" + _lines(whole, "ms", 1e3)


def text(rows: list[Row] | None = None) -> str:
    """The block: a table of targets, then a heading and tables for each part of the measurement."""
    found = Rows(gpu_rows() if rows is None else rows)
    large = [case_of(m, k, rank, p) for k in (768, 1024) for m in (50432, 6304) for rank in (16, 2) for p in (0.25, 0.0)]
    small = [case_of(1600, k, rank, p) for k in (768, 1024) for rank in (16, 2) for p in (0.25, 0.0)]
    parts = [
        "### The targets\n\n" + targets(found),
        "### One adapted layer\n\nForward and backward by graph: the floor's microseconds, then each over the floor, "
        "predicted / measured. Ranks up to 16 cost our kernels the same.\n\n" + _over(found, large),
        "How these come about, at 50,432 rows, K = 768, rank 16, p = 0.25; x is 77 MB:\n\n" + _arithmetic(found),
        *(f"### A step of ViT-B/16, {n} classes\n\n" + _steps(found, n) for n in CLASSES),
        "The microseconds of a block:\n\n" + _blocks(),
        "### Other tiles and forms, 50,432 rows, K = 768, rank 16\n\n" + _changes(found),
        "### Plain products\n\nµs by graph; TFLOP/s and share predicted / measured.\n\n" + _products(found),
        "### One adapted layer, 1600 rows\n\n" + _over(found, small),
        "### torch.compile of the textbook\n\n" + _compiled(found),
    ]
    return "\n\n".join(parts)
