"""Figures of a sweep: accuracy against shots for each data set and their mean, and bars for the options that differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runfolder import atomic
from .tables import Row, data_name, paper, paper_model, series

__all__ = ["figures"]

# Told apart by people with any colour vision, and by their markers in print (Okabe and Ito's palette).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b4c9a")
MARKERS = "osD^vPX"
GREY, SOFT = "#52606d", "#9aa4b2"
PANEL = (3.9, 3.1)
DPI = 144
MOST_COLUMNS = 4


def figures(rows: Sequence[Row], out: Path) -> list[tuple[str, Path]]:
    """Draw every figure that `rows` fill into `out`: (what it shows, PNG file)."""
    made = []
    plain = [row for row in rows if not row["axes"]]
    if len({row["shots"] for row in plain if row["method"] != "zero-shot"}) > 1:
        made.append(("Accuracy against shots", out / "shots.png"))
        _save(_against_shots(plain), made[-1][1])
    for number, (variant, group) in enumerate(series([row for row in rows if row["axes"]], lambda r: r["variant"]).items()):
        made.append((variant, out / f"options-{number + 1}.png"))
        _save(_by_options(group), made[-1][1])
    return made


def _against_shots(rows: Sequence[Row]) -> Any:
    """One panel a data set, and one for their mean where there are several."""
    of_data = series(rows, lambda r: r["data"])
    panels = [(data_name(group), [data], group) for data, group in of_data.items()]
    if len(of_data) > 1:
        panels.insert(0, (f"mean of {len(of_data)} data sets", list(of_data), list(rows)))
    figure, axes = _panels(len(panels), min(len(panels), MOST_COLUMNS), 1.9 if len(panels) == 1 else 1.0)
    variants = [v for v, group in series(rows, lambda r: r["variant"]).items() if group[0]["method"] != "zero-shot"]
    shots = sorted({row["shots"] for row in rows if row["method"] != "zero-shot"})
    published = paper(rows[0]["model"])
    for axis, (title, names, group) in zip(axes, panels, strict=False):
        zero = statistics.mean(of_data[name][0]["zero_shot_accuracy"] for name in names)
        axis.axhline(zero, color=GREY, linestyle=":", linewidth=1.3, label="zero-shot")
        for variant, colour, marker in zip(variants, _cycle(COLOURS), _cycle(MARKERS), strict=False):
            points = []
            for count in shots:
                means = [
                    [r["accuracy"] for r in group if (r["data"], r["variant"], r["shots"]) == (n, variant, count)]
                    for n in names
                ]
                if all(means):  # the spread is that of one data set's seeds; a mean over sets has none
                    spread = statistics.stdev(means[0]) if len(names) == 1 and len(means[0]) > 1 else 0.0
                    points.append((count, statistics.mean(statistics.mean(m) for m in means), spread))
            if points:
                x, y, spread = zip(*points, strict=True)
                axis.errorbar(
                    x, y, spread, color=colour, marker=marker, markersize=4.5, capsize=2.5, linewidth=1.6, label=variant
                )
        known = [(c, [published[c][n] for n in names if n in published[c]]) for c in sorted(published) if c in shots]
        if known and all(len(values) == len(names) for _, values in known):
            label = f"the paper, {paper_model(rows[0]['model'])}"
            axis.plot([c for c, _ in known], [statistics.mean(v) for _, v in known], color=SOFT, linestyle="--", marker=".",
                      linewidth=1.3, label=label)  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_xticks(shots, [str(count) for count in shots])
        axis.set_title(title, fontsize=10, loc="left")
        _tidy(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("labelled images a class", fontsize=9, color=GREY)
    figure.supylabel("test accuracy, %", fontsize=9, color=GREY)
    _legend(figure, axes[: len(panels)])
    return figure


def _by_options(rows: Sequence[Row]) -> Any:
    """One panel for each data set and value of the first option (of three), groups of bars by the next, colours by the last."""
    names = list(dict.fromkeys(name for row in rows for name in row["axes"]))
    order = sorted(names, key=lambda name: {"encoders": 0, "targets": 1, "layers": 1}.get(name, 2))
    bars, colours, split = _roles(order)
    panels = series(rows, lambda r: (r["data"], r["shots"], *(r["axes"].get(name, "") for name in split)))
    columns = len({key[2:] for key in panels}) if split else min(len(panels), MOST_COLUMNS)
    figure, axes = _panels(len(panels), min(columns, MOST_COLUMNS), 1.3 if len(panels) > 1 else 1.9)
    hues = list(series(rows, lambda r: _hue(r, colours)))
    groups = list(dict.fromkeys(row["axes"].get(bars, "") for row in rows))
    best = max(row["accuracy"] for row in rows)
    for axis, (key, group) in zip(axes, panels.items(), strict=False):
        width = 0.8 / len(hues)
        for number, hue in enumerate(hues):
            for place, name in enumerate(groups):
                values = [r["accuracy"] for r in group if r["axes"].get(bars, "") == name and _hue(r, colours) == hue]
                if values:
                    spread = statistics.stdev(values) if len(values) > 1 else None
                    label = " ".join(f"{n} {v}" for n, v in zip(colours, hue, strict=True))
                    at = place + (number - (len(hues) - 1) / 2) * width
                    look = {"color": COLOURS[number % len(COLOURS)], "error_kw": {"elinewidth": 1, "ecolor": GREY}}
                    axis.bar(at, statistics.mean(values), width * 0.9, yerr=spread, capsize=2, label=label or None, **look)
        axis.axhline(group[0]["zero_shot_accuracy"], color=GREY, linestyle=":", linewidth=1.3, label="zero-shot")
        axis.set_xticks(range(len(groups)), groups, fontsize=8)
        axis.set_ylim(0, best * 1.08)
        said = [f"{n} {v}" for n, v in zip(split, key[2:], strict=True)]
        axis.set_title(", ".join([data_name(group), f"{key[1]} shot{'s' * (key[1] > 1)}", *said]), fontsize=10, loc="left")
        _tidy(axis)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel(bars, fontsize=9, color=GREY)
    figure.supylabel("test accuracy, %", fontsize=9, color=GREY)
    _legend(figure, axes[: len(panels)])
    return figure


def _hue(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(row["axes"].get(name, "") for name in names)


def _roles(names: list[str]) -> tuple[str, list[str], list[str]]:
    """Which option makes groups of bars, which ones colours, which ones panels."""
    if len(names) == 1:
        return names[0], [], []
    if len(names) == 2:
        return names[0], names[1:], []
    return names[1], names[2:], names[:1]


def _panels(count: int, columns: int, width: float = 1.0) -> tuple[Any, list[Any]]:
    """A figure of `count` panels, each `width` times as wide as usual."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = math.ceil(count / columns)
    figure = Figure(figsize=(PANEL[0] * width * columns, PANEL[1] * lines + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, columns, squeeze=False).flat)


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(SOFT)
    axis.tick_params(labelsize=8, color=SOFT)
    axis.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axis.set_axisbelow(True)


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    """One for the whole figure, each name once."""
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_size_inches()[0] / (0.55 + 0.085 * max(map(len, named)))))
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _cycle(values: Sequence[str]) -> list[str]:
    return list(values) * 8


def _save(figure: Any, path: Path) -> None:
    # no date and version inside: the same rows give the same bytes
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
