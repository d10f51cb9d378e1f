"""What a call of `benchmarks/device.py` found, in lines of at most 80 columns: made from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .items import CANARY, PARTS, Row

__all__ = ["measured_points", "summary"]

FLOOR, OURS, EAGER, PAPER = "frozen", "fastlora triton", "fastlora eager", "the paper's arithmetic"
# The heads of columns, where names are too long.
SHORT = {
    OURS: "ours", EAGER: "eager", "cuBLAS beta=1": "beta=1", "full fine-tuning": "full", "torch.compile(textbook)": "compile",
    "dense ΔW": "dense",
}  # fmt: skip
WIDTH = 80


def summary(rows: list[Row], unreached: list[str]) -> str:
    """The findings of a call, part by part, and what it did not reach."""
    blocks = [_canary(rows), _layers(rows), _steps(rows), _products(rows), _tuned(rows), _bits(rows), measured_points(rows)]
    blocks += [_wrong(rows), _unreached(unreached), _clock(rows)]
    return "\n".join(f"\n{block}" for block in blocks if block)


def _cut(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _canary(rows: list[Row]) -> str:
    """How many checks were right."""
    found = [row for row in rows if row.get("part") == CANARY and row["row"] in ("check", "tests", "bits")]
    if not found:
        return ""
    red = sum("refused" in row for row in found)
    skipped = [row for row in found if "skipped" in row]
    worst = max((row["worst"] for row in found if row.get("worst") is not None), default=None)
    lines = [f"canary: {len(found) - red - len(skipped)} checks right, {red} red, {len(skipped)} skipped"]
    lines += [] if worst is None else [f"  the largest error is {worst:.2f} of what the rule allows"]
    lines += [_cut(f"  skipped: {row['case']}: {row['skipped']}") for row in skipped]
    return "\n".join(lines + [_cut(f"  noted: {row['noted'][0]}", 2 * WIDTH) for row in found if "noted" in row])


def _grid(title: str, heads: Iterable[str], lines: Iterable[tuple[str, ...]]) -> str:
    """Columns as wide as they must be, the first to the left."""
    table = [tuple(heads), *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))])
        for line in table
    ]
    return "\n".join([title, *(_cut(line) for line in text)])


def _layers(rows: list[Row]) -> str:
    """Forward and backward of one layer by graph replay, over the frozen layer."""
    found = [row for row in rows if row["row"] == "op" and row.get("phase") == "both" and "median_ms" in row]
    method = "graph" if any(row["method"] == "graph" for row in found) else "clock"
    times = {(row["case"], row["contestant"]): row["median_ms"] for row in found if row["method"] == method}
    if not times:
        return ""
    names = [name for name in dict.fromkeys(name for _, name in times) if name != FLOOR]
    lines = []
    for case in dict.fromkeys(case for case, _ in times):
        floor = times.get((case, FLOOR))
        cells = [_number(times.get((case, name)), floor) for name in names]
        label = case.replace("qkv ", "").rpartition("->")[0] + " " + case.partition(" r=")[2].rpartition(" ")[0]
        lines.append((label, "–" if floor is None else f"{floor * 1e3:.0f}", *cells))
    heads = ("rows x width, rank, p", "frozen µs", *(SHORT.get(name, name) for name in names))
    return _grid(f"forward and backward over frozen, by {method}", heads, lines)


def _number(value: float | None, floor: float | None) -> str:
    return "–" if value is None or floor is None else f"{value / floor:.2f}"


def _steps(rows: list[Row]) -> str:
    """Milliseconds of a step, over the paper's code as it is, and the peak memory at the most classes."""
    found = {(r["classes"], r["contestant"], r["engine"]): r for r in rows if r["row"] == "step" and "median_ms" in r}
    if not found:
        return ""
    sizes = sorted({classes for classes, _, _ in found})
    lines = []
    for name, engine in dict.fromkeys((name, engine) for _, name, engine in found):
        cells = []
        for classes in sizes:
            row, paper = found.get((classes, name, engine)), found.get((classes, PAPER, "as written"))
            over = f" {paper['median_ms'] / row['median_ms']:4.1f}×" if row and paper else ""
            cells.append("–" if row is None else f"{row['median_ms']:.1f}{over}")
        peak = found.get((sizes[-1], name, engine), {}).get("peak_bytes")
        lines.append((f"{name}, {engine}", *cells, "–" if peak is None else f"{peak / 2**30:.1f}"))
    heads = ("ms a step; how often the paper's", *(f"{classes} cl." for classes in sizes), "GiB")
    return _grid("steps", heads, lines)


def _products(rows: list[Row]) -> str:
    """Triton's best plain product beside cuBLAS."""
    speeds: dict[tuple[str, int, int, int], dict[str, float]] = {}
    for row in rows:
        if row["row"] == "gemm" and "tflops" in row:
            speeds.setdefault((row["product"], row["m"], row["k"], row["n"]), {})[row["contestant"]] = row["tflops"]
    lines = []
    for (product, m, k, n), of in speeds.items():
        cublas, best = of.get("cuBLAS"), max((v for name, v in of.items() if name != "cuBLAS"), default=None)
        ratio = "–" if cublas is None or best is None else f"{best / cublas:.2f}"
        lines.append((f"{product} {m}x{k}->{n}", *("–" if v is None else f"{v:.0f}" for v in (cublas, best)), ratio))
    return _grid("plain products, TFLOP/s", ("", "cuBLAS", "Triton", "ratio"), lines) if lines else ""


def _tuned(rows: list[Row]) -> str:
    """For each case and direction the time as it stands, and the best of all trials."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if row["row"] == "tune" and "median_ms" in row:
            times.setdefault((row["case"], row["phase"]), {})[row["change"]] = row["median_ms"] * 1e3
    lines = []
    for (case, phase), of in times.items():
        change = min(of, key=lambda name: of[name])
        stands = f"{of['as it stands']:.1f} µs as it stands, " if "as it stands" in of else ""
        lines += [f"{case} {phase}:", f"  {stands}best of {len(of)}: {of[change]:.1f} µs", f"  {change}"]
    return "\n".join(["tile table", *map(_cut, lines)]) if lines else ""


def _bits(rows: list[Row]) -> str:
    """Whether results still have the bits that they had at first."""
    found = [row for row in rows if row["row"] == "bits" and "same" in row]
    moved = [row["case"] for row in found if not row["same"]]
    if not found:
        return ""
    return "\n  ".join([f"bits: {len(found) - len(moved)} of {len(found)} cases are as they were at first", *moved])


def measured_points(rows: list[Row]) -> str:
    """The times of both backends at width 768, as kernels/tiles.py holds them: each line belongs to the row of its class."""
    gpu = next((row.get("gpu") for row in rows if row["row"] == "run"), None)
    times: dict[tuple[int, int, float], dict[str, float]] = {}
    for row in rows:
        if row["row"] == "op" and row.get("phase") == "both" and row.get("method") == "graph" and row["k"] == 768:
            times.setdefault((row["rank"], row["m"], row["dropout"]), {})[row["contestant"]] = row["median_ms"] * 1e3
    lines = [
        f"  rank {rank}, dropout {p:g}: Measured(GPU, {m}, {us[OURS]:.1f}, {us[EAGER]:.1f})"
        for (rank, m, p), us in sorted(times.items())
        if {OURS, EAGER} <= us.keys()
    ]
    return "\n".join([f"for kernels/tiles.py, GPU = {gpu!r}:", *lines]) if lines else ""


def _wrong(rows: list[Row]) -> str:
    """Each item that was refused, or failed."""
    lines = []
    for row in rows:
        why = row.get("refused") or row.get("failed")
        if why:
            lines.append(f"  {row.get('item')}: {why if isinstance(why, str) else '; '.join(why)}")
    return "\n".join(["refused or failed:", *(_cut(line, 2 * WIDTH) for line in dict.fromkeys(lines))]) if lines else ""


def _unreached(unreached: list[str]) -> str:
    """What is left for the next call, the first few of each part by name."""
    lines = []
    for part, title in PARTS.items():
        mine = [item.partition(": ")[2] for item in unreached if item.startswith(f"{part}: ")]
        if mine:
            more = [f"    and {len(mine) - 2} more"] if len(mine) > 2 else []
            lines += [f"  {part}, {title}: {len(mine)}", *(_cut(f"    {name}") for name in mine[:2]), *more]
    return "\n".join(["not reached, the next call goes on there:", *lines]) if lines else ""


def _clock(rows: list[Row]) -> str:
    """The seconds that each part took beside those expected, and kernels that were not compiled ahead."""
    ends = [row for row in rows if row["row"] == "end"]
    total: Callable[[str, str], float] = lambda part, key: sum(row[key] for row in ends if row["part"] == part)  # noqa: E731
    parts = [part for part in PARTS if any(row["part"] == part for row in ends)]
    lines = [
        (f"{part}, {PARTS[part]}", f"{total(part, 'seconds'):.1f}", f"{total(part, 'expected_s'):.1f}",
         f"{total(part, 'waited_s'):.1f}", f"{total(part, 'compiled_late'):.0f}")
        for part in parts
    ]  # fmt: skip
    ahead = [row for row in rows if row["row"] == "ahead"]
    compiled = "" if not ahead else "compiled ahead: {done} of {kernels} kernels, {wrong} refused".format(**ahead[-1])
    clock = _grid("the clock", ("part", "seconds", "expected", "waited", "late"), lines) if lines else ""
    return "\n".join(text for text in (clock, compiled) if text)
