"""Pictures from rows, each a matplotlib figure: time, memory, ratio to the floor, cost as work grows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from .rows import FLOOR, MODEL, OURS, Row, fit, latest, median, over, pick
from .table import seconds
from .tables import curves, ordered

__all__ = ["PLOTS", "hero", "memory", "overview", "ratios", "scaling", "times"]

INK, SOFT, LINE = "#1f2933", "#64748b", "#e2e8f0"
# ours in blue, the floor in grey, rivals in warm colours: told apart by lightness too
COLOURS = {
    OURS: "#1d4ed8", "fastlora eager": "#1d4ed8", "fastlora triton": "#1e3a8a", "fastlora, share_prefix": "#60a5fa",
    "fastlora, host's encoders": "#93c5fd", "fastlora, compiled": "#0e7490", FLOOR: "#94a3b8", "textbook": "#f59e0b",
    "torch.compile(textbook)": "#fbbf24", "the paper's arithmetic": "#dc2626", "dense ΔW": "#dc2626", "PEFT": "#c2410c",
    "full fine-tuning": "#57534e",
}  # fmt: skip
MARKERS = {OURS: "o", FLOOR: "s", "textbook": "^", "the paper's arithmetic": "D"}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "xtick.color": SOFT,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.fonttype": "path", "svg.hashsalt": "fastlora",
    }  # fmt: skip
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    return figure, axes


def _bars(axis: Any, values: dict[str, float], text: Callable[[float], str], title: str) -> None:
    names = list(values)[::-1]
    bars = axis.barh(names, [values[n] for n in names], color=[COLOURS.get(n, SOFT) for n in names], height=0.72)
    axis.bar_label(bars, [text(values[n]) for n in names], padding=4, color=INK, fontsize=9)
    axis.set_title(title)
    axis.set_xlim(0, max(values.values()) * 1.2)
    axis.tick_params(axis="both", length=0)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)


def _short(case: str) -> str:
    """Without what all steps share."""
    return case.replace(" r=2 p=0.25", "").replace(" batch ", ", batch ") if "classes" in case else case


def _panels(groups: dict[str, dict[str, float]], text: Callable[[float], str], suptitle: str) -> Any:
    """A figure of bar panels, two in a row."""
    groups = {title: values for title, values in groups.items() if len(values) > 1}
    if not groups:
        return None
    rows, columns = -(-len(groups) // 2), min(2, len(groups))
    longest = max(len(values) for values in groups.values())
    figure, axes = _figure(rows, columns, 5.6 * columns, rows * (0.9 + 0.3 * longest) + 0.4)
    for axis, (title, values) in zip(axes.flat, groups.items(), strict=False):
        _bars(axis, values, text, title)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_axis_off()
    figure.suptitle(suptitle, x=0.01, ha="left", fontsize=12)
    return figure


def _steps(rows: list[Row]) -> list[Row]:
    return latest([r for r in pick(rows, row="step") if r["method"] != "graph"], "case", "contestant", "method")


def _per_case(rows: list[Row], key: str, scale: float = 1.0) -> dict[str, dict[str, float]]:
    """Case, in short -> contestant -> the median of a value."""
    groups: dict[str, dict[str, float]] = {}
    for case in ordered(rows, "case"):
        for name in ordered(pick(rows, case=case), "contestant"):
            if (value := median(pick(rows, case=case, contestant=name), key)) is not None:
                groups.setdefault(_short(case), {})[name] = value * scale
    return groups


def times(rows: list[Row]) -> Any:
    """Seconds of a training step, one panel a job."""
    return _panels(_per_case(_steps(rows), "median_ms"), seconds, "One training step")


def ratios(rows: list[Row]) -> Any:
    """One adapted layer, forward and backward, over the frozen layer."""
    found = pick(rows, row="op", phase="both")
    return _panels(_per_case(found, "over_frozen"), lambda v: f"{v:.2f} ×", "One layer, forward + backward, over frozen")


def memory(rows: list[Row]) -> Any:
    """Peak memory of a step."""
    groups = _per_case([row for row in rows if "peak_bytes" in row], "peak_bytes", 2**-30)
    return _panels(groups, lambda v: f"{v:.2f} GiB", "Peak memory of a training step, in a fresh process")


def scaling(rows: list[Row]) -> Any:
    """Seconds of a step against classes, batch, rank, depth and width, in logarithms, with fitted exponents."""
    axes_of = ordered(pick(rows, row="scaling"), "axis")
    drawn = {axis: {n: p for n, p in curves(rows, axis).items() if len(p) > 1} for axis in axes_of}
    drawn = {axis: found for axis, found in drawn.items() if found}
    if not drawn:
        return None
    columns = min(3, len(drawn))
    rows_of_panels = -(-len(drawn) // columns)
    figure, panels = _figure(rows_of_panels, columns, 4.2 * columns, 3.2 * rows_of_panels + 0.6)
    for panel, (axis, found) in zip(panels.flat, drawn.items(), strict=False):
        for name, points in found.items():
            xs, ys = zip(*points, strict=True)
            panel.plot(xs, ys, color=COLOURS.get(name, SOFT), marker=MARKERS.get(name, "o"), markersize=4, label=name)
            exponent = f"{fit(points)[1]:.2f}"
            panel.annotate(exponent, (xs[-1], ys[-1]), (7, -3), textcoords="offset points", fontsize=8, annotation_clip=False)
        panel.set(xscale="log", yscale="log", title=axis)
        panel.set_xticks(xs, [f"{x:g}" for x in xs])
        panel.set_xticks([], minor=True)
        panel.margins(x=0.14)
        panel.yaxis.set_major_formatter(lambda v, _: f"{v:g} s")
        panel.yaxis.set_minor_formatter(lambda v, _: f"{v:.1g} s" if f"{v:e}"[0] in "25" else "")
        panel.grid(True, which="major", color=LINE, linewidth=0.8)
        panel.set_axisbelow(True)
    for panel in list(panels.flat)[len(drawn) :]:
        panel.set_axis_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False)
    title = "A training step of the mini CLIP as work grows; the number is the fitted exponent"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def overview(rows: list[Row]) -> dict[str, dict[str, float]]:
    """What README's figure shows: time of a ViT-B-32 step over fastlora's, by number of classes and method."""
    found = [row for row in _steps(rows) if row.get("model") == MODEL and row.get("batch") == 32]
    groups = {}
    for case in ordered(found, "case"):
        mine = pick(found, case=case)
        values = {n: over(mine, n, OURS) for n in (OURS, "full fine-tuning", "PEFT", "textbook", "the paper's arithmetic")}
        if values[OURS]:
            title = f"{mine[0]['classes']} classes (fastlora {seconds(median(pick(mine, contestant=OURS), 'median_ms'))})"
            groups[title] = {n: round(statistics.median(v), 2) for n, v in values.items() if v}
    return {title: values for title, values in groups.items() if len(values) > 1}


def hero(rows: list[Row]) -> Any:
    """README's figure: the paper's model at 10, 100 and 1000 classes, time over fastlora's."""
    groups = overview(rows)
    if not groups:
        return None
    figure, axes = _figure(1, len(groups), 4.0 * len(groups), 2.3)
    for i, (axis, (title, values)) in enumerate(zip(axes.flat, groups.items(), strict=True)):
        _bars(axis, values, lambda v: f"{v:.1f} ×", title)
        if i:
            axis.set_yticks([])
    return figure


PLOTS: dict[str, Callable[[list[Row]], Any]] = {
    "overview": hero, "time": times, "ratio": ratios, "memory": memory, "scaling": scaling,
}  # fmt: skip
