"""What a GPU is to reach, beside what is predicted and what was measured: ratios with both sides in one run."""

from __future__ import annotations

from expected.layers import layer
from expected.measured import Rows, case_of
from expected.steps import step
from fastlora.bench.table import NONE, Table

OURS, PAPER, FULL = "fastlora", "the paper's arithmetic", "full fine-tuning"
# (classes, times as fast as the paper's code as it is, as that captured in a graph), ours by graph
STEPS = ((10, 3.0, 1.5), (100, 3.0, 2.0), (1000, 14.0, 8.0))


def _line(what: str, sign: str, bound: float, expected: float, measured: tuple[float | None, float | None]) -> tuple[str, ...]:
    """measured: both sides of the ratio."""
    over, under = measured
    found = None if over is None or under is None else over / under

    def verdict(value: float) -> str:
        return "met" if (value <= bound if sign == "≤" else value >= bound) else "missed"

    cells = (f"{expected:.2f}", verdict(expected), NONE, "") if found is None else (
        f"{expected:.2f}", verdict(expected), f"{found:.2f}", verdict(found))  # fmt: skip
    return what, f"{sign} {bound:.3g}", *cells


def targets(rows: Rows) -> str:
    """A table: what, target, predicted and what that means, measured and what that means."""
    lines = []
    for m, k in ((50432, 768), (50432, 1024), (6304, 768), (6304, 1024)):
        for dropout in (0.0, 0.25):
            case = case_of(m, k, 16, dropout)
            value = layer(case, "fastlora triton").both / layer(case, "frozen").both
            bound = 1.25 if m == 6304 else 1.15 if dropout else 1.10
            found = rows.layer(case, "fastlora triton"), rows.layer(case, "frozen")
            lines.append(_line(f"layer, {m} rows, K = {k}, p = {dropout:g}: over frozen", "≤", bound, value, found))
    for classes, as_written, captured in STEPS:
        ours = step(classes, OURS, "graph").both
        for engine, bound in (("as written", as_written), ("graph", captured)):
            how = "as it is" if engine == "as written" else "in a graph"
            found = rows.step(classes, PAPER, engine), rows.step(classes, OURS, "graph")
            value = step(classes, PAPER, engine).both / ours
            lines.append(_line(f"step, {classes} classes: times as fast as the paper's code {how}", "≥", bound, value, found))
    peak = {name: step(1000, name, "graph").peak for name in (OURS, PAPER, FULL)}
    for name, bound in ((PAPER, 1 / 4), (FULL, 1 / 3)):
        found = rows.peak(1000, OURS), rows.peak(1000, name)
        lines.append(_line(f"step, 1000 classes: memory, of {name}", "≤", bound, peak[OURS] / peak[name], found))
    return Table("", ("what", "target", "predicted", "", "measured", ""), lines).markdown()
