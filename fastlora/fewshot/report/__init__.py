"""report.html: one file that a browser shows without a server or a script. Plots are SVG in the colours of its theme."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..datasets import Item
from ..recipe import templates
from ..result import Result
from . import mistakes, plots
from .html import bar, change, percent, section, size, table, text, tile, value
from .style import STYLE

__all__ = ["write"]


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
    title = f"{config['recipe']['model']} on {config['data_name']}"
    parts = [_base_to_new(metrics), _also(metrics)]
    if history is not None:
        parts.append(section("training", "Training", "", "<figure>" + plots.curves(history) + "</figure>"))
    parts.append(_classes(metrics))
    if len(after.labels):
        parts += [_confusion(after, metrics), _calibration(after, metrics)]
        parts += [mistakes.surest(after, test), mistakes.weakest_classes(after, test)]
    parts.append(section("settings", "Settings", "", _settings(config, metrics)))
    body = [part for part in parts if part]
    head = [
        f"<h1>{text(title)}</h1>",
        f'<div class="soft">{text(_subtitle(config))}</div>',
        _hero(config, metrics),
        _tiles(metrics),
        _notes(metrics),
        _links(body),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join([*filter(None, head), *body])
        + f"\n<footer>fastlora {text(metrics['environment']['fastlora'])}</footer></body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _links(parts: Sequence[str]) -> str:
    """Links to the sections that are there."""
    links = []
    for part in parts:
        name = part.split('id="', 1)[1].split('"', 1)[0]
        title = part.split(">", 1)[1].split("<", 1)[0]
        links.append(f'<a href="#{name}">{title}</a>')
    return f"<nav>{''.join(links)}</nav>"


def _subtitle(config: dict[str, Any]) -> str:
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


def _hero(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """What the run came to, as two numbers and a sentence."""
    zero, after = metrics["zero_shot_accuracy"], metrics["accuracy"]
    what = f"of {metrics['test_images']:,} test images of {len(config['classes']):,} classes"
    if metrics["method"] == "zero-shot":
        return f'<div class="hero"><div class="big">{after:.2f} %<small>zero-shot accuracy, {what}</small></div></div>'
    images = metrics.get("train_images")
    said = f"{change(zero, after, 2)} points"
    if images:
        said += f" from {images:,} labelled images"
    if training := metrics.get("training"):
        said += f", {training['steps']:,} steps and {_duration(training['seconds'])}"
    return (
        f'<div class="hero"><div class="from">{zero:.2f} %<small>zero-shot, before</small></div><div class="arrow">→</div>'
        f'<div class="big">{after:.2f} %<small>test accuracy, {what}</small></div><div class="words">{said}.</div></div>'
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _tiles(metrics: dict[str, Any]) -> str:
    tiles = []
    if "top5_accuracy" in metrics:
        tiles.append(tile(f"{metrics['top5_accuracy']:.2f} %", "right among the five most probable"))
    tiles.append(tile(f"{metrics['mean_of_classes']:.2f} %", "mean of the classes' accuracies"))
    tiles.append(tile(f"{metrics['calibration']['ece']:.2f} %", "calibration error (ECE)"))
    if training := metrics.get("training"):
        tiles.append(tile(f"{training['steps_per_second']:.2f}", "steps a second"))
        tiles.append(tile(f"{training['trainable_parameters']:,}", "trainable parameters"))
    if memory := metrics.get("memory"):
        tiles.append(tile(size(memory["process"]), "peak memory of the process"))
        if "gpu" in memory:
            tiles.append(tile(size(memory["gpu"]), "peak memory on the GPU"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _notes(metrics: dict[str, Any]) -> str:
    lines = "".join(f"<li>{text(note)}</li>" for note in metrics.get("notes", ()))
    return f'<div class="notes"><b>Notes on the data</b><ul>{lines}</ul></div>' if lines else ""


def _base_to_new(metrics: dict[str, Any]) -> str:
    if (halves := metrics.get("base_to_new")) is None:
        return ""
    rows = []
    names = {
        "base": f"base, trained on ({halves['base_classes']} classes)",
        "new": f"new, never seen ({halves['new_classes']} classes)",
        "harmonic_mean": "harmonic mean",
    }
    for key, name in names.items():
        zero, after = halves["zero_shot"][key], halves[key]
        bars = f'<div class="bars">{bar("before", zero)}{bar("after", after)}</div>'
        rows.append((text(name), percent(zero), percent(after), change(zero, after), bars))
    head = ("classes", "zero-shot", "after", "points", _key(True))
    lead = (
        "Each half is told apart by its own words alone. What is lost on new classes is the price of what is won on base ones."
    )
    return section("base-to-new", "Base to new", lead, table(head, rows, (1, 2, 3)))


def _also(metrics: dict[str, Any]) -> str:
    if not metrics.get("also"):
        return ""
    rows = []
    for row in metrics["also"]:
        zero, after = row["zero_shot"], row["accuracy"]
        about = f"({row['classes']:,} classes, {row['test_images']:,} images)"
        name = f'{text(Path(row["data"]).name)} <span class="soft">{about}</span>'
        bars = f'<div class="bars">{bar("before", zero)}{bar("after", after)}</div>'
        rows.append((name, percent(zero), percent(after), change(zero, after), bars))
    head = ("data set", "before", "after", "points", _key(True))
    lead = "None of these were trained on: a loss is what the model forgot, a gain what it learnt beside its own classes."
    return section("also", "On other data sets", lead, table(head, rows, (1, 2, 3)))


def _key(trained: bool) -> str:
    return '<span class="key before"></span>zero-shot' + ('<span class="key after"></span>after' if trained else "")


def _classes(metrics: dict[str, Any]) -> str:
    trained = metrics["method"] != "zero-shot"
    rows = []
    for row in sorted(metrics["per_class"], key=lambda r: (r["accuracy"] is None, -(r["accuracy"] or 0), r["class"])):
        zero, after = row["zero_shot"], row["accuracy"]
        bars = f'<div class="bars">{bar("before", zero)}{bar("after", after) if trained else ""}</div>'
        known = zero is not None and after is not None
        more = [percent(after), change(zero, after, 0) if known else ""] if trained else []
        rows.append((text(row["class"]), f"{row['images']:,}", percent(zero), *more, bars))
    head = ("class", "images", "zero-shot", *(("after", "points") if trained else ()), _key(trained))
    body = f'<div class="scroll">{table(head, rows, (1, 2, 3, 4) if trained else (1, 2))}</div>'
    return section("classes", "Accuracy per class", "", body)


def _confusion(after: Result, metrics: dict[str, Any]) -> str:
    rows = [(text(r["class"]), text(r["predicted"]), f"{r['images']:,}") for r in metrics["most_confused"][:12]]
    if not rows:
        return section("confusion", "What is taken for what", "Every test image was recognised.", "")
    pairs = table(("class", "taken for", "images"), rows, (2,))
    body = f'<div class="two"><figure>{plots.confusion(after)}</figure><div>{pairs}</div></div>'
    return section(
        "confusion", "What is taken for what", "Each row is a true class; a perfect model has the diagonal alone.", body
    )


def _calibration(after: Result, metrics: dict[str, Any]) -> str:
    ece, zero = metrics["calibration"]["ece"], metrics["calibration"]["zero_shot_ece"]
    rows = [
        (f"{100 * b.low:.0f}–{100 * b.high:.0f} %", f"{b.images:,}", percent(b.confidence), percent(b.accuracy))
        for b in after.bins()
        if b.images
    ]
    confidence = 100 * float(after.confidence.double().mean())
    gap = confidence - after.accuracy
    kind = (
        "as sure as it is right" if abs(gap) < 1 else f"{abs(gap):.1f} points {'surer' if gap > 0 else 'less sure'} than right"
    )
    lead = (
        f"On average the model is {kind}. The expected calibration error is {ece:.2f} % (zero-shot {zero:.2f} %): the mean"
        " distance of accuracy from confidence over the bins, by images. Orange: surer than right. Pale: less sure than right."
    )
    bins = table(("confidence", "images", "mean confidence", "accuracy"), rows, (1, 2, 3))
    body = f'<div class="two"><figure>{plots.reliability(after)}</figure><div>{bins}</div></div>'
    return section("calibration", "Is it as sure as it is right?", lead, body)


def _settings(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    recipe = dict(config["recipe"])
    lora = recipe.pop("lora")
    training = {"lr", "lr_min", "iterations", "batch_size", "weight_decay", "betas", "crop_scale", "flip", "max_side",
                "kl_weight", "kl_temperature", "lr_ratio", "average"}  # fmt: skip
    recipe.update({key: metrics["resolved"][key] for key in metrics["resolved"]})
    shown = {k: v for k, v in recipe.items() if metrics.get("training") or k not in training}
    tables = [("Recipe", {**shown, "data": config["data"]}), ("LoRA", lora if recipe["method"] == "lora" else {}),
              ("Seconds", {k: f"{v:.1f}" for k, v in metrics["timings"].items()}),
              ("Environment", metrics["environment"])]  # fmt: skip
    blocks = "".join(
        f'<div><table><tr><th colspan="2">{name}</th></tr>'
        + "".join(f"<tr><td>{text(key)}</td><td>{text(value(given))}</td></tr>" for key, given in values.items())
        + "</table></div>"
        for name, values in tables
        if values
    )
    return f'<div class="two">{blocks}</div>'
