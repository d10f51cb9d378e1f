"""The report's plots: SVG with text that stays text, in the colours of the page."""

from __future__ import annotations

import io
import re
import warnings
from typing import Any

import torch
from torch import Tensor

from ..result import BINS, Result
from .style import AFTER, BEFORE

__all__ = ["INK", "confusion", "curves", "reliability"]

# matplotlib has no "inherit": this colour is replaced by CSS's currentColor, so that plots follow the page's theme.
INK = "#010203"
# Class names beside a matrix are readable up to about this many.
NAMED_CLASSES = 30
OVER = "#f97316"


def figure(width: float, height: float, columns: int = 1, rows: int = 1, **grid: Any) -> tuple[Any, Any]:
    """A matplotlib figure (without pyplot: no global state, no display) with transparent ground, and its axes in a list."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **grid).flatten()
    made.patch.set_alpha(0)
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        for spine in axis.spines.values():
            spine.set_color(INK)
            spine.set_alpha(0.35)
        axis.tick_params(colors=INK, labelsize=9)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return made, axes


def svg(made: Any, label: str) -> str:
    """The figure as an SVG element whose ids begin with `label`, which screen readers say."""
    import matplotlib

    buffer = io.StringIO()
    # text stays text, drawn by the browser: it has the glyphs that matplotlib's font lacks
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawn = buffer.getvalue()
    drawn = re.sub("<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL).replace(INK, "currentColor")
    # ids are numbered within one figure, and several share the page
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{label}-", drawn)
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def curves(history: Tensor) -> str:
    """Loss and training accuracy: every step lightly, a running mean over 2 % of the run on top."""
    made, axes = figure(10.4, 3.1, 2)
    steps = torch.arange(1, len(history) + 1)
    window = max(1, len(history) // 50)
    for axis, values, name in zip(
        axes, (history[:, 0], 100 * history[:, 1]), ("loss", "accuracy of the batch, %"), strict=True
    ):
        total = torch.cat([torch.zeros(1, dtype=torch.float64), values.double().cumsum(0)])
        first = (steps - window).clamp(min=0)
        mean = (total[steps] - total[first]) / (steps - first)
        # an SVG of 8000 points twice is heavy and shows no more than 1500
        thin = torch.unique(torch.linspace(0, len(steps) - 1, 1500).round().to(torch.int64))
        axis.plot(steps[thin].numpy(), values[thin].numpy(), color=BEFORE, linewidth=0.7, alpha=0.7)
        axis.plot(steps[thin].numpy(), mean[thin].numpy(), color=AFTER, linewidth=1.8)
        axis.set_title(name, loc="left", fontsize=11, color=INK)
        axis.set_xlabel("step", fontsize=10)
        axis.grid(color=INK, alpha=0.08)
        axis.set_xlim(1, max(2, len(history)))
    return svg(made, "training-curves")


def confusion(after: Result) -> str:
    """Share of each true class (row) that is predicted as each class (column)."""
    from matplotlib.colors import LinearSegmentedColormap

    matrix = after.confusion().double()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    n = len(after.classes)
    made, axes = figure(5.6, 5.6)
    axis = axes[0]
    clear = LinearSegmentedColormap.from_list("clear", [(0.231, 0.51, 0.965, 0.0), (0.231, 0.51, 0.965, 1.0)])
    if n <= NAMED_CLASSES:  # vector squares stay sharp; many would make a heavy file
        axis.pcolormesh(share.numpy(), cmap=clear, vmin=0, vmax=1)
        axis.set_aspect("equal")
        axis.invert_yaxis()
        ticks = [i + 0.5 for i in range(n)]
        axis.set_xticks(ticks, after.classes, rotation=90)
        axis.set_yticks(ticks, after.classes)
        if n <= 12:
            for row, column in matrix.nonzero().tolist():
                axis.text(column + 0.5, row + 0.5, int(matrix[row, column]), ha="center", va="center", fontsize=8, color=INK)
    else:
        axis.imshow(share.numpy(), cmap=clear, vmin=0, vmax=1, interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
    axis.spines[["top", "right"]].set_visible(True)
    axis.set_xlabel("predicted", fontsize=10)
    axis.set_ylabel("true class", fontsize=10)
    return svg(made, "confusion")


def reliability(after: Result) -> str:
    """Accuracy against confidence, bin by bin: orange where confidence is above it, pale where below; and images a bin."""
    made, axes = figure(5.2, 5.0, rows=2, sharex=True, gridspec_kw={"height_ratios": [3.4, 1]})
    top, bottom = axes
    filled = [b for b in after.bins() if b.images]
    low, width = [100 * b.low for b in filled], 100 / BINS
    accuracy, confidence = [b.accuracy or 0.0 for b in filled], [b.confidence or 0.0 for b in filled]
    under = [min(pair) for pair in zip(accuracy, confidence, strict=True)]
    look = {"align": "edge", "edgecolor": "none"}
    top.bar(low, under, width, color=AFTER, alpha=0.85, **look)
    top.bar(low, [a - u for a, u in zip(accuracy, under, strict=True)], width, bottom=under, color=AFTER, alpha=0.4, **look)
    top.bar(low, [c - u for c, u in zip(confidence, under, strict=True)], width, bottom=under, color=OVER, alpha=0.55, **look)
    top.plot([0, 100], [0, 100], color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
    top.set_ylim(0, 100)
    top.set_ylabel("accuracy, %", fontsize=10)
    bottom.bar(low, [b.images for b in filled], width, color=BEFORE, **look)
    bottom.set_ylabel("images", fontsize=10)
    bottom.set_xlim(0, 100)
    bottom.set_xlabel("confidence, %", fontsize=10)
    for axis in axes:
        axis.grid(color=INK, alpha=0.08)
        axis.set_axisbelow(True)
    return svg(made, "reliability")
