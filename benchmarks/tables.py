"""Results as text: each case and phase, the floor's time, and every contestant's time over it."""

from __future__ import annotations

from typing import Any

FLOOR = "frozen"


def ratio_table(rows: list[dict[str, Any]]) -> str:
    """Rows that hold case, phase, contestant, method and median_ms -> one table a method; "-" where nothing was measured."""
    timed = [row for row in rows if "median_ms" in row and "case" in row]
    lines: list[str] = []
    for method in sorted({row["method"] for row in timed}):
        found = {(r["case"], r["phase"], r["contestant"]): r["median_ms"] for r in timed if r["method"] == method}
        names = [name for name in dict.fromkeys(r["contestant"] for r in timed) if name != FLOOR]
        heads = "".join(f"  {name[:22]:>{max(8, min(len(name), 22))}s}" for name in names)
        lines += ["", f"time over {FLOOR}, by {method}", f"{'case':52s} {'phase':8s} {FLOOR + ' ms':>10s}{heads}"]
        for case, phase in dict.fromkeys((r["case"], r["phase"]) for r in timed):
            floor = found.get((case, phase, FLOOR))
            if floor is None:
                continue
            cells = ""
            for name in names:
                time = found.get((case, phase, name))
                text = "-" if time is None else f"{time / floor:.2f}"
                cells += f"  {text:>{max(8, min(len(name), 22))}s}"
            lines.append(f"{case:52s} {phase:8s} {floor:10.3f}{cells}")
    return "\n".join(lines)
