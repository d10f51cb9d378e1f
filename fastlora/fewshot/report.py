"""report.html: one file that a browser shows without a server. Plots are inlined as SVG and follow its light or dark theme."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .datasets import Item
from .images import thumbnail
from .recipe import templates
from .result import Result

__all__ = ["write"]

# matplotlib has no "inherit": this colour is replaced by CSS's currentColor, so that plots follow the page's theme.
INK = "#010203"
BEFORE, AFTER = "#9aa4b2", "#3b82f6"
MOST_MISTAKES = 18
THUMBNAIL = 96
# Class names beside a matrix are readable up to about this many.
NAMED_CLASSES = 30

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #64748b; --line: #e2e8f0; --page: #ffffff; --card: #f8fafc;
  --before: #9aa4b2; --after: #3b82f6; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9f0; --soft: #94a3b8; --line: #334155; --page: #0f172a;
  --card: #1e293b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 36px 28px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 44px 0 12px; }
.soft { color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 22px 0 0; }
.tile { flex: 1 1 150px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.3; } .tile span { color: var(--soft); font-size: 13px; }
figure { margin: 0; } svg { max-width: 100%; height: auto; } svg text { font-family: inherit !important; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { max-height: 640px; overflow: auto; } .scroll th { position: sticky; top: 0; background: var(--page); }
.bars { width: 38%; min-width: 160px; } .bars div { height: 7px; border-radius: 3px; margin: 2px 0; min-width: 1px; }
.before { background: var(--before); } .after { background: var(--after); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 14px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 8px 40px; align-items: start; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 16px; }
.mistakes img { width: 100%; border-radius: 8px; display: block; } .mistakes figcaption { font-size: 13px; line-height: 1.4; }
.mistakes figcaption, td { overflow-wrap: anywhere; }
ul { padding-left: 20px; } footer { margin-top: 52px; color: var(--soft); font-size: 13px; }
"""


def write(
    path: Path,
    config: dict[str, Any],
    metrics: dict[str, Any],
    before: Result,
    after: Result,
    test: Sequence[Item],
    history: Tensor | None,
) -> None:
    """Write the report.

    Args:
        path: the file.
        config: what config.json holds.
        metrics: what metrics.json holds.
        before, after: predictions before and after adaptation, in the order of `test`.
        test: the test images.
        history: loss and accuracy of each step, (steps, 2), or None where nothing was trained.
    """
    recipe = config["recipe"]
    title = f"{recipe['model']} on {config['data_name']}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        f'<div class="soft">{_text(_subtitle(config, metrics))}</div>',
        _tiles(config, metrics),
    ]
    if metrics.get("notes"):
        parts.append("<h2>Notes on the data</h2><ul>" + "".join(f"<li>{_text(n)}</li>" for n in metrics["notes"]) + "</ul>")
    if history is not None:
        parts.append("<h2>Training</h2><figure>" + _curves(history) + "</figure>")
    parts.append("<h2>Accuracy per class</h2>" + _class_table(metrics))
    if len(after.labels):
        parts.append("<h2>What is taken for what</h2>" + _confusion(after, metrics))
        parts.append(_mistakes(after, test))
    parts.append("<h2>Settings</h2>" + _settings(config, metrics))
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(part for part in parts if part)
        + f"\n<footer>fastlora {_text(metrics['environment']['fastlora'])}</footer></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _subtitle(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    recipe = config["recipe"]
    lora = recipe["lora"]
    how = {
        "lora": f"LoRA of rank {lora['rank']} on {', '.join(lora['targets'])} of {' and '.join(lora['encoders'])}",
        "full": "full fine-tuning",
        "linear-probe": "linear probe on frozen features",
        "tip-adapter-f": "Tip-Adapter-F on frozen features",
        "coop": "CoOp, 16 learned vectors before the class names",
        "zero-shot": "zero-shot, nothing trained",
    }[recipe["method"]]
    shots = (
        ""
        if recipe["method"] == "zero-shot"
        else f" · {recipe['shots']} shot{'s' * (recipe['shots'] > 1)} · seed {recipe['seed']}"
    )
    prompts = templates(config["template"])
    words = f"“{prompts[0]}”" if len(prompts) == 1 else f"{len(prompts)} templates, averaged"
    return f"{how}{shots} · {words}"


def _tiles(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    tiles = []
    if config["recipe"]["method"] != "zero-shot":
        tiles.append((f"{metrics['accuracy']:.2f} %", "test accuracy"))
    tiles.append((f"{metrics['zero_shot_accuracy']:.2f} %", "zero-shot, before"))
    tiles.append((f"{metrics['test_images']:,}", f"test images of {len(config['classes'])} classes"))
    if training := metrics.get("training"):
        tiles.append(
            (f"{training['seconds']:.0f} s", f"{training['steps']:,} steps, {training['steps_per_second']:.2f} a second")
        )
        tiles.append((f"{training['trainable_parameters']:,}", "trainable parameters"))
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{v}</b><span>{_text(k)}</span></div>' for v, k in tiles)
        + "</div>"
    )


def _class_table(metrics: dict[str, Any]) -> str:
    trained = metrics["method"] != "zero-shot"
    rows = []
    for row in sorted(metrics["per_class"], key=lambda r: (r["accuracy"] is None, -(r["accuracy"] or 0), r["class"])):
        zero, after = row["zero_shot"], row["accuracy"]
        bars = _bar("before", zero) + (_bar("after", after) if trained else "")
        cells = f'<td class="n">{_percent(zero)}</td>' + (f'<td class="n">{_percent(after)}</td>' if trained else "")
        name, images = _text(row["class"]), row["images"]
        rows.append(f'<tr><td>{name}</td><td class="n">{images}</td>{cells}<td class="bars">{bars}</td></tr>')
    heads = '<th class="n">zero-shot</th>' + ('<th class="n">after</th>' if trained else "")
    key = '<span class="key before"></span>zero-shot' + ('<span class="key after"></span>after' if trained else "")
    head = f'<tr><th>class</th><th class="n">images</th>{heads}<th>{key}</th></tr>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _bar(kind: str, value: float | None) -> str:
    return "" if value is None else f'<div class="{kind}" style="width:{value:.1f}%"></div>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def _confusion(after: Result, metrics: dict[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{_text(r["class"])}</td><td>{_text(r["predicted"])}</td><td class="n">{r["images"]}</td></tr>'
        for r in metrics["most_confused"][:12]
    )
    if not rows:
        return '<p class="soft">Every test image was recognised.</p>'
    table = f'<table><tr><th>class</th><th>taken for</th><th class="n">images</th></tr>{rows}</table>'
    return f'<div class="two"><figure>{_heat_map(after)}</figure><div>{table}</div></div>'


def _mistakes(after: Result, test: Sequence[Item]) -> str:
    """The mistakes the model was surest of, at most two a class."""
    wrong = (after.labels != after.predicted).nonzero()[:, 0]
    order = wrong[after.confidence[wrong].argsort(descending=True)].tolist()
    shown: list[int] = []
    seen: dict[int, int] = {}
    for i in order:
        label = int(after.labels[i])
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= 2 and len(shown) < MOST_MISTAKES:
            shown.append(i)
    if not shown:
        return ""
    cards = "".join(
        f'<figure><img src="{_png(thumbnail(test[i], THUMBNAIL))}" alt="{_text(test[i].name)}" title="{_text(test[i].name)}">'
        f"<figcaption>{_text(after.classes[after.labels[i]])}<br>"
        f'<span class="soft">taken for {_text(after.classes[after.predicted[i]])}, {after.confidence[i]:.0%}</span>'
        "</figcaption></figure>"
        for i in shown
    )
    count = f'<p class="soft">{len(wrong):,} of {len(after.labels):,}; the surest ones, at most two a class.</p>'
    return f'<h2>Mistakes</h2>{count}<div class="mistakes">{cards}</div>'


def _settings(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    recipe = dict(config["recipe"])
    lora = recipe.pop("lora")
    training = {"lr", "lr_min", "iterations", "batch_size", "weight_decay", "betas", "crop_scale", "flip", "max_side"}
    recipe.update({key: metrics["resolved"][key] for key in metrics["resolved"]})
    shown = {k: v for k, v in recipe.items() if metrics.get("training") or k not in training}
    tables = [("Recipe", {**shown, "data": config["data"]}), ("LoRA", lora if recipe["method"] == "lora" else {}),
              ("Seconds", {k: f"{v:.1f}" for k, v in metrics["timings"].items()}),
              ("Environment", metrics["environment"])]  # fmt: skip
    blocks = "".join(
        f'<div><table><tr><th colspan="2">{name}</th></tr>'
        + "".join(f"<tr><td>{_text(key)}</td><td>{_text(_value(value))}</td></tr>" for key, value in values.items())
        + "</table></div>"
        for name, values in tables
        if values
    )
    return f'<div class="two">{blocks}</div>'


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(v) for v in value)
    return "–" if value is None else str(value)


def _text(value: object) -> str:
    return html.escape(str(value))


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    """A matplotlib figure (without pyplot: no global state, no display) with transparent ground."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    figure.patch.set_alpha(0)
    for axis in axes:
        axis.patch.set_alpha(0)
        axis.spines[["top", "right"]].set_visible(False)
        for spine in axis.spines.values():
            spine.set_color(INK)
            spine.set_alpha(0.35)
        axis.tick_params(colors=INK, labelsize=9)
        axis.xaxis.label.set_color(INK)
        axis.yaxis.label.set_color(INK)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    import matplotlib

    buffer = io.StringIO()
    # text stays text, drawn by the browser: it has the glyphs that matplotlib's font lacks
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub("<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL).replace(INK, "currentColor")
    # ids are numbered within one figure, and several share the page
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{label}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _curves(history: Tensor) -> str:
    """Loss and training accuracy: every step lightly, a running mean over 2 % of the run on top."""
    figure, axes = _figure(10.4, 3.1, 2)
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
    return _svg(figure, "training-curves")


def _heat_map(after: Result) -> str:
    """Share of each true class (row) that is predicted as each class (column)."""
    from matplotlib.colors import LinearSegmentedColormap

    matrix = after.confusion().double()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    n = len(after.classes)
    figure, axes = _figure(5.6, 5.6, 1)
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
    axis.spines[["top", "right"]].set_visible(True)
    axis.set_xlabel("predicted", fontsize=10)
    axis.set_ylabel("true class", fontsize=10)
    return _svg(figure, "confusion")
