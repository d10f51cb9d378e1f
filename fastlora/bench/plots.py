"""Pictures from rows, each a matplotlib figure: time, memory, ratio to the floor, cost as work grows."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from typing import Any

from .rows import FLOOR, MODEL, OURS, PAPER, Row, fit, latest, median, over, pick
from .table import ratios as ratios_of
from .table import seconds
from .tables import by_size, curves, ordered

__all__ = ["PLOTS", "hero", "memory", "overview", "ratios", "scaling", "times"]

INK, SOFT, LINE = "#1f2933", "#64748b", "#e2e8f0"
# ours in blue, the floor in grey, rivals in warm colours: told apart by lightness too
COLOURS = {
    OURS: "#1d4ed8", "fastlora eager": "#1d4ed8", "fastlora triton": "#1e3a8a", "fastlora, share_prefix": "#60a5fa",
    "fastlora, host's encoders": "#93c5fd", "fastlora, compiled": "#0e7490", FLOOR: "#94a3b8", "textbook": "#f59e0b",
    "torch.compile(textbook)": "#fbbf24", "the paper's arithmetic": "#dc2626", "dense ΔW": "#dc2626", "PEFT": "#c2410c",
    "full fine-tuning": "#57534e", "cuBLAS beta=1": "#a16207",
}  # fmt: skip
MARKERS = {OURS: "o", FLOOR: "s", "textbook": "^", "the paper's arithmetic": "D"}


def _figure(rows: int, columns: int, width: float, height: float, ratios: list[float] | None = None) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": LINE, "xtick.color": SOFT,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "svg.fonttype": "path", "svg.hashsalt": "fastlora",
    }  # fmt: skip
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained", height_ratios=ratios
    )
    return figure, axes


def _bars(axis: Any, values: dict[str, float], labels: dict[str, str], title: str, places: int) -> None:
    """Horizontal bars, the first one on top; places: those of the fullest panel, so that bars are as thick in all."""
    names = list(values)[::-1]
    bars = axis.barh(names, [values[n] for n in names], color=[COLOURS.get(n, SOFT) for n in names], height=0.72)
    axis.bar_label(bars, [labels[n] for n in names], padding=4, color=INK, fontsize=9)
    axis.set_title(title)
    # room for the label behind the longest bar
    axis.set_xlim(0, max(values.values()) * (1.08 + 0.02 * max(map(len, labels.values()))))
    axis.set_ylim(len(names) - places - 0.5, len(names) - 0.5)
    axis.tick_params(axis="both", length=0)
    axis.xaxis.set_visible(False)
    axis.spines[["bottom", "left"]].set_visible(False)


def _short(case: str) -> str:
    """Without what all steps share, in words."""
    return re.sub(r" batch (\d+) classes (\d+)", r", batch \1, \2 classes", case.replace(" r=2 p=0.25", ""))


def _panels(groups: dict[str, dict[str, float]], text: Callable[[float], str], suptitle: str) -> Any:
    """A figure of bar panels, two in a row."""
    groups = {title: values for title, values in groups.items() if len(values) > 1}
    if not groups:
        return None
    rows, columns = -(-len(groups) // 2), min(2, len(groups))
    counts = [len(values) for values in groups.values()]
    longest = [max(counts[row * columns : (row + 1) * columns]) for row in range(rows)]
    heights = [0.9 + 0.3 * places for places in longest]
    figure, axes = _figure(rows, columns, 5.6 * columns, sum(heights) + 0.4, heights)
    for i, (axis, (title, values)) in enumerate(zip(axes.flat, groups.items(), strict=False)):
        _bars(axis, values, {name: text(value) for name, value in values.items()}, title, longest[i // columns])
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_axis_off()
    figure.suptitle(suptitle, x=0.01, ha="left", fontsize=12)
    return figure


def _steps(rows: list[Row]) -> list[Row]:
    return latest([r for r in pick(rows, row="step") if r["method"] != "graph"], "case", "contestant", "method")


def _per_case(rows: list[Row], key: str, scale: float = 1.0) -> dict[str, dict[str, float]]:
    """Case, in short -> contestant -> the median of a value."""
    groups: dict[str, dict[str, float]] = {}
    for case in by_size(rows):
        for name in ordered(pick(rows, case=case), "contestant"):
            if (value := median(pick(rows, case=case, contestant=name), key)) is not None:
                groups.setdefault(_short(case), {})[name] = value * scale
    return groups


def times(rows: list[Row]) -> Any:
    """Seconds of a training step, one panel a job."""
    found = _steps(rows)
    chunks = "; from 1000 classes on what computes padding is timed in chunks" if pick(found, method="chunks") else ""
    return _panels(_per_case(found, "median_ms"), seconds, f"One training step, less is better{chunks}")


def ratios(rows: list[Row]) -> Any:
    """One adapted layer, forward and backward, over the frozen layer."""
    found = pick(rows, row="op", phase="both")
    return _panels(_per_case(found, "over_frozen"), lambda v: f"{v:.2f} ×", "One layer, forward + backward, over frozen")


def memory(rows: list[Row]) -> Any:
    """Peak memory of a step."""
    groups = _per_case([row for row in rows if "peak_bytes" in row], "peak_bytes", 2**-30)
    return _panels(groups, lambda v: f"{v:.2f} GiB", "Peak memory of a training step, in a fresh process")


GROWS = {
    "classes": "classes", "batch": "images a step", "rank": "rank of the adapters", "depth": "blocks in each tower",
    "width": "width of both towers",
}  # fmt: skip


def scaling(rows: list[Row]) -> Any:
    """Seconds of a step against classes, batch, rank, depth and width, in logarithms, with fitted exponents."""
    axes_of = ordered(pick(rows, row="scaling"), "axis")
    drawn = {axis: {n: p for n, p in curves(rows, axis).items() if len(p) > 1} for axis in axes_of}
    drawn = {axis: found for axis, found in drawn.items() if found}
    if not drawn:
        return None
    columns = min(3, len(drawn))
    rows_of_panels = -(-len(drawn) // columns)
    figure, panels = _figure(rows_of_panels, columns, 4.4 * columns, 3.2 * rows_of_panels + 0.6)
    for panel, (axis, found) in zip(panels.flat, drawn.items(), strict=False):
        _curves(panel, found)
        panel.set_title(GROWS.get(axis, axis))
    for panel in list(panels.flat)[len(drawn) :]:
        panel.set_axis_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False)
    title = "Seconds of a training step of the mini CLIP as work grows; beside each line its exponent: time = c · size^exponent"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def _curves(panel: Any, found: dict[str, list[tuple[float, float]]]) -> None:
    """One panel of lines, each with its exponent at the right edge in its own colour, no two on one another."""
    for name, points in found.items():
        xs, ys = zip(*points, strict=True)
        panel.plot(xs, ys, color=COLOURS.get(name, SOFT), marker=MARKERS.get(name, "o"), markersize=4, label=name)
    sizes = sorted({x for points in found.values() for x, _ in points})
    panel.set(xscale="log", yscale="log")
    panel.set_xticks(sizes, [f"{x:g}" for x in sizes])
    panel.set_xticks([], minor=True)
    low, high = panel.get_ylim()
    ticks = _ticks(low, high)
    panel.set_yticks(ticks, [f"{tick:.3g} s" for tick in ticks])
    panel.set_yticks([], minor=True)
    panel.set_ylim(low, high)
    panel.grid(True, which="major", color=LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    heights = {n: math.log(points[-1][1] / low) / math.log(high / low) for n, points in found.items()}
    lowest = 0.0
    for name in sorted(heights, key=lambda n: heights[n]):
        lowest = max(lowest, heights[name])
        style = {"color": COLOURS.get(name, SOFT), "fontsize": 8.5, "fontweight": "bold", "va": "center"}
        panel.annotate(f"{fit(found[name])[1]:.2f}", (1.02, lowest), xycoords="axes fraction", annotation_clip=False, **style)
        lowest += 0.065  # the height of a label


def _ticks(low: float, high: float) -> list[float]:
    """Round values between two, at least three of them: 1, 2, 5, and closer ones where the range is short."""
    steps: list[tuple[float, ...]] = [(1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(n / 10 for n in range(10, 100, 5))]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for choice in steps:
        ticks = [m * 10.0**power for power in powers for m in choice if low <= m * 10.0**power <= high]
        if len(ticks) >= 3:
            break
    return ticks


def overview(rows: list[Row]) -> dict[str, dict[str, list[float]]]:
    """What README's figure shows: time of a ViT-B-32 step over fastlora's in each run, by number of classes and method."""
    found = [row for row in _steps(rows) if row.get("model") == MODEL and row.get("batch") == 32]
    groups = {}
    for case in by_size(found):
        mine = pick(found, case=case)
        values = {n: over(mine, n, OURS) for n in (OURS, "full fine-tuning", "PEFT", "textbook", PAPER)}
        if values[OURS]:
            title = f"{mine[0]['classes']} classes (fastlora {seconds(median(pick(mine, contestant=OURS), 'median_ms'))})"
            groups[title] = {n: [round(ratio, 3) for ratio in v] for n, v in values.items() if v}
    return {title: values for title, values in groups.items() if len(values) > 1}


def hero(rows: list[Row]) -> Any:
    """README's figure: the paper's model at 10, 100 and 1000 classes, time over fastlora's."""
    groups = overview(rows)
    if not groups:
        return None
    figure, axes = _figure(1, len(groups), 4.0 * len(groups), 2.6)
    for i, (axis, (title, values)) in enumerate(zip(axes.flat, groups.items(), strict=True)):
        labels = {name: ratios_of(v, 1, " ×") for name, v in values.items()}
        _bars(axis, {name: statistics.median(v) for name, v in values.items()}, labels, title, len(values))
        if i:
            axis.set_yticks([])
    title = "A training step of ViT-B-32: time over fastlora's, less is better (± between whole runs)"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


PLOTS: dict[str, Callable[[list[Row]], Any]] = {
    "overview": hero, "time": times, "ratio": ratios, "memory": memory, "scaling": scaling,
}  # fmt: skip
