"""Tables from rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from .rows import FLOOR, MODEL, OURS, PAPER, PREFIX, WHY_NOT, Row, fit, latest, median, over, pick, shares, step_ratios
from .table import NONE, Table, percent, ratio, ratios, seconds, size
from .targets import targets

__all__ = [
    "agreement",
    "everything",
    "kept_memory",
    "machine",
    "memory",
    "not_timed",
    "ops",
    "overview",
    "savings",
    "scaling",
    "steps",
]

CHUNKS = " ᶜ"  # timed in chunks of classes


def ordered(rows: list[Row], key: str) -> list[Any]:
    """The values of a key, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def by_size(rows: list[Row]) -> list[Any]:
    """The cases by model, the paper's first, batch and classes."""
    models = sorted(ordered([row for row in rows if "model" in row], "model"), key=lambda model: model != MODEL)
    sizes = {
        row["case"]: (models.index(row["model"]), row.get("batch", 0), row.get("classes", 0)) for row in rows if "model" in row
    }
    return sorted(ordered(rows, "case"), key=lambda case: sizes.get(case, (len(models), 0, 0)))


def machine(rows: list[Row]) -> Table | None:
    """What the rows were measured on."""
    found = list({row["env"].get("date"): (row["env"], row["limits"]) for row in rows if row["env"]}.values())
    if not found:
        return None
    env = found[-1][0]
    versions = env.get("versions", {})
    cells = [("machine", f"{env.get('gpu') or env.get('cpu')}, {env.get('cores')} cores, {env.get('threads')} threads")]
    if env.get("driver"):
        cells.append(("driver", f"{env['driver']}, CUDA {env.get('cuda')}"))
    cells.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)))
    dates, commits = (sorted({str(e.get(key)) for e, _ in found if e.get(key)}) for key in ("date", "commit"))
    cells += [("date", " to ".join(dict.fromkeys((dates[0][:16], dates[-1][:16])))), ("commit", ", ".join(commits))]
    for key, unit, scale in (("flops", "GFLOP/s", 1e9), ("bandwidth", "GB/s", 1e9)):
        values = [limits[key] / scale for _, limits in found if limits]
        if values:
            what = "product of large matrices" if key == "flops" else "copy, read and written"
            cells.append((what, f"{statistics.median(values):.0f} {unit} ({min(values):.0f} to {max(values):.0f})"))
    return Table("Machine", ("", "of these rows"), cells, text=2)


def steps(rows: list[Row], *, one: bool = False) -> Table | None:
    """Whole training steps: time, over the floor, over fastlora, share of the machine's GEMM speed, saved bytes.

    one: whether all rows are of one job, whose name then needs no column.
    """
    found = [row for row in pick(rows, row="step") if row["method"] != "graph"]
    cells = []
    for name in by_size(found):
        of_case = latest(pick(found, case=name), "contestant", "method")
        for contestant in ordered(of_case, "contestant"):
            mine = pick(of_case, contestant=contestant)
            cells.append(
                (
                    *(() if one else (name,)),
                    contestant + (CHUNKS if mine[0]["method"] == "chunks" else ""),
                    seconds(median(mine, "median_ms")),
                    ratios(over(of_case, contestant, FLOOR)),
                    ratios(over(of_case, contestant, OURS)),
                    percent(statistics.median(speed) if (speed := shares(of_case, contestant)) else None),
                    size(median(mine, "saved_bytes")),
                )
            )
    if not cells:
        return None
    heads = ("method", "a step", "over frozen", "over fastlora", "of GEMM speed", "saved for backward")
    note = f"{CHUNKS.strip()} timed in chunks of 50 classes: a whole step does not fit in memory." if any(
        CHUNKS in cell for row in cells for cell in row) else ""  # fmt: skip
    title = f"One training step: {found[0]['case']}" if one else "Training steps"
    table = Table(title, heads if one else ("step", *heads), cells, note, 1 if one else 2)
    return table if pick(found, contestant=FLOOR) else table.without("over frozen")


def overview(rows: list[Row]) -> Table | None:
    """The paper's model on one page: a step by number of classes, each method's time over fastlora's, and its peak memory."""
    found = pick(rows, row="step", model=MODEL, batch=32)
    cases = {row["classes"]: row["case"] for row in sorted(found, key=lambda row: row["classes"])}
    if not cases:
        return None
    cells = []
    for name in (OURS, PREFIX, "textbook", "PEFT", "full fine-tuning", PAPER):
        line = [name]
        for case in cases.values():
            mine, times = pick(found, case=case, contestant=name), over(pick(found, case=case), name, OURS)
            mark = CHUNKS if mine and mine[0]["method"] == "chunks" else ""
            line.append(f"{seconds(median(mine, 'median_ms'))}{mark}, {ratios(times, times=' ×')}" if times else NONE)
        peak = median(pick(rows, row="memory", model=MODEL, classes=100, contestant=name), "peak_bytes")
        cells.append((*line, size(peak)))
    note = f"{CHUNKS.strip()} timed in chunks of 50 classes: a whole step does not fit in memory."
    heads = ("method", *(f"{classes} classes" for classes in cases), "peak memory, 100 classes")
    return Table("A training step of ViT-B-32", heads, cells, note if any(CHUNKS in c for r in cells for c in r) else "")


def graph_steps(rows: list[Row]) -> Table | None:
    """Whole steps on a GPU: by events and by replay of a CUDA graph."""
    found = [row for row in pick(rows, row="step") if row["method"] in ("events", "graph")]
    cells = []
    for case in ordered(found, "case"):
        for contestant in ordered(pick(found, case=case), "contestant"):
            mine = pick(found, case=case, contestant=contestant)
            times = [median(pick(mine, method=method), "median_ms") for method in ("events", "graph")]
            cells.append((case, contestant, *map(seconds, times)))
    return Table("Steps on a GPU", ("step", "method", "events", "graph replay"), cells, text=2) if cells else None


def ops(rows: list[Row], *, one: bool = False) -> Table | None:
    """One adapted layer: each phase over the frozen layer's, and the share of the roofline of both.

    one: whether all rows are of one layer, whose name then needs no column.
    """
    found = pick(rows, row="op")
    cells = []
    for case in ordered(found, "case"):
        for method in ordered(pick(found, case=case), "method"):
            of_case = pick(found, case=case, method=method)
            for contestant in ordered(of_case, "contestant"):
                mine = pick(of_case, contestant=contestant)
                both = pick(mine, phase="both")
                phases = [_over_frozen(pick(mine, phase=phase)) for phase in ("forward", "backward", "both")]
                end = (median(both, "median_ms"), median(both, "share_of_roofline"), median(both, "saved_bytes"))
                label = case if method == "clock" else f"{case}, {method}"
                line = (*map(ratios, phases), seconds(end[0]), percent(end[1]), size(end[2]))
                cells.append((*(() if one else (label,)), contestant, *line))
    heads = ("method", "forward", "backward", "both, over frozen", "both", "of roofline", "saved")
    if not cells:
        return None
    if one:
        return Table(f"One adapted layer: {found[0]['case']}", heads, cells)
    return Table("One adapted layer", ("layer", *heads), cells, text=2)


def _over_frozen(rows: list[Row]) -> list[float]:
    """The ratio to the floor, of each round where the rows keep them."""
    kept = [value for row in rows for value in row.get("ratios", [])]
    return kept or [row["over_frozen"] for row in rows if "over_frozen" in row]


def savings(rows: list[Row]) -> Table | None:
    """One step with each of its savings taken away, over the step that has all."""
    heads = ("without", "a step", "over the step with all", "saved for backward")
    found = pick(rows, row="savings")
    cells = []
    for row in found:
        values = [v for whole in pick(found, without="nothing", run=row.get("run")) for v in step_ratios(row, whole)]
        cells.append((row["without"], seconds(row["median_ms"]), ratios(values), size(row["saved_bytes"])))
    return Table("What each saving is worth", heads, cells) if cells else None


def kept_memory(rows: list[Row]) -> Table | None:
    """A step in a process that keeps what it frees, and in one that does not: each a process of its own."""
    found = pick(rows, row="allocator")
    cells = []
    for row in found:
        with_all = pick(found, contestant=OURS, keeps_freed=True, run=row.get("run"))
        values = [v for whole in with_all for v in step_ratios(row, whole)]
        faults = [n for n in row["page_faults"] if n is not None]
        way = "kept, as `fastlora train` does" if row["keeps_freed"] else "given back, as by default"
        line = (row["contestant"], way, seconds(row["median_ms"]), ratios(values))
        cells.append((*line, f"{statistics.median(faults):,.0f}" if faults else NONE))
    heads = ("method", "freed memory is", "a step", "over fastlora that keeps it", "page faults a step")
    return Table("Kept memory", heads, cells, text=2) if cells else None


def not_timed(rows: list[Row]) -> Table | None:
    """What has no time, and why: refused by the gate, skipped or failed."""
    cells: list[tuple[str, ...]] = []
    for row in pick(rows, row="not timed"):
        how = next(how for how in sorted(WHY_NOT) if how in row)
        why = row[how] if isinstance(row[how], str) else "; ".join(row[how])
        what = str(row["case"] if "case" in row else row["product"])
        cells.append((what, str(row["contestant"]), f"{how}: {why}"))
    return Table("Not timed", ("what", "method", "why"), list(dict.fromkeys(cells)), text=3) if cells else None


def memory(rows: list[Row]) -> Table | None:
    """Peak memory of a step in a fresh process."""
    found = [row for row in rows if "peak_bytes" in row]
    cells = []
    for case in ordered(found, "case"):
        of_case = pick(found, case=case)
        ours = median(pick(of_case, contestant=OURS), "peak_bytes")
        for contestant in ordered(of_case, "contestant"):
            mine = pick(of_case, contestant=contestant)
            peak, growth = median(mine, "peak_bytes"), median(mine, "growth_bytes")
            part = ours / peak if ours and peak else None
            cells.append((case, contestant, size(peak), size(growth), ratio(part)))
        if (paper := _extrapolated(found, of_case)) and ours:
            cells.append((case, f"{PAPER} ᵉ", size(paper[0]), size(paper[1]), ratio(ours / paper[0])))
    heads = ("step", "method", "peak", "growth over the state before the first step", "fastlora's peak over it")
    fewer = map(str, sorted({row["classes"] for row in pick(found, contestant=PAPER)}))
    note = f"ᵉ extrapolated: a line through {', '.join(fewer)} classes." if any("ᵉ" in cell[1] for cell in cells) else ""
    if len({cell[0] for cell in cells}) == 1:  # a column of equal cells
        return Table(f"Peak memory: {cells[0][0]}", heads[1:], [cell[1:] for cell in cells], note)
    return Table("Peak memory", heads, cells, note, 2) if cells else None


def _extrapolated(rows: list[Row], of_case: list[Row]) -> tuple[float, float] | None:
    """(peak, growth) of the paper's arithmetic where it was not measured: a line through its steps of fewer classes."""
    if pick(of_case, contestant=PAPER):
        return None
    same = [row for row in rows if (row["model"], row["batch"]) == (of_case[0]["model"], of_case[0]["batch"])]
    fewer = [row for row in pick(same, contestant=PAPER) if row["classes"] < of_case[0]["classes"]]
    if len({row["classes"] for row in fewer}) < 2:
        return None
    found = []
    for key in ("peak_bytes", "growth_bytes"):
        line = statistics.linear_regression([row["classes"] for row in fewer], [row[key] for row in fewer])
        found.append(line.slope * of_case[0]["classes"] + line.intercept)
    return found[0], found[1]


def curves(rows: list[Row], axis: str) -> dict[str, list[tuple[float, float]]]:
    """Contestant -> points (size, seconds) of one axis."""
    found = pick(rows, row="scaling", axis=axis)
    return {
        name: sorted((size, median(pick(found, contestant=name, size=size), "median_ms") / 1e3)  # type: ignore[operator]
        for size in ordered(pick(found, contestant=name), "size"))
        for name in ordered(found, "contestant")
    }  # fmt: skip


def scaling(rows: list[Row]) -> Table | None:
    """How the cost of a step grows: seconds at the smallest and the largest size, and fitted exponents."""
    cells = []
    for axis in ordered(pick(rows, row="scaling"), "axis"):
        for name, points in curves(rows, axis).items():
            if len(points) < 2:
                continue
            (low, first), (high, last) = points[0], points[-1]
            slopes = [f"{fit(part)[1]:.2f}" for part in (points, points[-2:])]
            cells.append((axis, name, f"{low:g}: {seconds(first * 1e3)}", f"{high:g}: {seconds(last * 1e3)}", *slopes))
    heads = ("grows", "method", "smallest", "largest", "exponent", "exponent, last two sizes")
    note = "time = c · size^exponent, least squares in logarithms over all sizes, and over the two largest."
    return Table("Cost as work grows", heads, cells, note, 2) if cells else None


def agreement(rows: list[Row]) -> Table | None:
    """The harness's times beside code of its own process that knows nothing of the harness."""
    found = pick(rows, row="agreement")
    cells = []
    for name in ordered(found, "contestant"):
        mine = pick(found, contestant=name)
        runs, parts = [], []
        for run in ordered(mine, "run"):
            inside, outside = (median(pick(mine, run=run, where=where), "seconds") for where in ("inside", "outside"))
            if inside and outside:
                runs.append((inside, outside))
                parts += _paired(pick(mine, run=run))
        if runs:
            inside, outside = (statistics.median(column) for column in zip(*runs, strict=True))
            part = statistics.median(parts)
            verdict = "agree" if abs(part - 1) <= 0.1 else "differ by more than 10 %"
            cells.append((name, seconds(inside * 1e3), seconds(outside * 1e3), ratios(parts), verdict))
    heads = ("method", "in the harness", "outside, on Hugging Face's CLIP", "ratio", "")
    return Table("Another person's check", heads, cells) if cells else None


def _paired(rows: list[Row]) -> list[float]:
    """Each step in the harness over the step outside of the same number."""
    inside, outside = ([row["seconds"] for row in pick(rows, where=where)] for where in ("inside", "outside"))
    return [a / b for a, b in zip(inside, outside, strict=False)]


def _each_case(make: Callable[..., Table | None], rows: list[Row], kind: str) -> list[Table | None]:
    found = pick(rows, row=kind)
    return [make(pick(found, case=case), one=True) for case in by_size(found)]


def everything(rows: list[Row]) -> list[Table]:
    """All tables that the rows have something for."""
    made = [machine(rows), targets(rows), *_each_case(steps, rows, "step"), graph_steps(rows), savings(rows)]
    made += [kept_memory(rows), memory(rows)]
    made += [*_each_case(ops, rows, "op"), scaling(rows), agreement(rows), not_timed(rows)]
    return [table for table in made if table is not None]
