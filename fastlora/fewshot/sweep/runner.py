"""A sweep from start to end: check everything, carry out what is missing, write the rows, render tables and figures."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .. import datasets, models
from ..devices import choose_device, choose_dtype
from ..errors import UserError
from ..lock import owned
from ..shared import Shared
from ..signals import Signals
from .execute import Place, execute, locate
from .grid import Grid, Run
from .results import check_place, row_of, write_rows
from .tables import series

__all__ = ["Engine", "check", "finished", "local", "sweep"]

# An engine carries out runs in any order and tells of each as it ends: the run, and what went wrong or None.
Engine = Callable[[Sequence[Run], Place], Iterator[tuple[Run, str | None]]]


def check(grid: Grid, place: Place, shared: Shared) -> None:
    """Find every mistake that can be found before a model is loaded.

    Raises:
        UserError: a data set that is not there or not whole, no such model, an adapter that does not fit, no such device.
    """
    device = choose_device(place.device)
    for run in grid.runs:
        choose_dtype(run.recipe.precision, device)
    known: dict[tuple[str, str | None, bool | None], Any] = {}
    for run in grid.runs:
        key = run.recipe.model, run.recipe.pretrained, run.recipe.quick_gelu
        if key not in known:
            known[key] = models.check(*key)
        if run.recipe.method == "lora":
            models.check_adapter(known[key], run.recipe.lora)
    for data, how in dict.fromkeys((run.data, run.recipe.reading) for run in grid.runs):
        datasets.check_training(shared.dataset(data, locate(data, place.roots), how))


def local(runs: Sequence[Run], place: Place, shared: Shared | None = None) -> Iterator[tuple[Run, str | None]]:
    """One run after another in this process, with one loaded model and each image decoded once."""
    shared = shared or Shared()
    for run in runs:
        yield run, execute(run, place, shared)


def sweep(grid: Grid, place: Place, console: Console, engine: Engine | None = None) -> list[dict[str, Any]]:
    """Carry out the runs of `grid` that are not done in `place.out`, and write the rows of all that are.

    Args:
        engine: what carries out runs; None for `local`.

    Returns:
        The rows, in the order of the grid.

    Raises:
        UserError: a mistake found before anything began, or, at the end, runs that failed.
        Interrupted: a signal stopped it; the same call goes on.
    """
    shared = Shared()
    check(grid, place, shared)
    with Signals(f"go on with: {place.again}"), owned(place.out):
        check_place(place.out)
        named = series(grid.runs, lambda run: run.name)
        done = {name for name, same in named.items() if row_of(same[0], place.out) is not None}
        todo = [same[0] for name, same in named.items() if name not in done]
        console.print(f"{len(named)} runs, {len(done)} done before, {len(todo)} to do", highlight=False)
        rows = _Rows(grid, place)
        failed: dict[str, str] = {}
        with _Progress(console, len(named), len(done)) as progress:
            outcomes = engine(todo, place) if engine is not None else local(todo, place, shared)
            with contextlib.closing(outcomes):  # type: ignore[type-var]  # engines are generators
                for run, error in outcomes:
                    row = row_of(run, place.out)
                    if row is None:
                        failed[run.name] = error or "it left no metrics.json"
                    else:
                        rows.take(named[run.name])
                        write_rows(place.out, rows.all())
                    progress.tell(run, row, failed.get(run.name))
        if rows.all():  # else there is no run either by which the next sweep would know them as its own
            write_rows(place.out, rows.all())
    if failed:
        name, reason = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(named)} runs failed, the first is {name}: {reason}")
    return rows.all()


def finished(grid: Grid, place: Place) -> list[dict[str, Any]]:
    """The rows of the runs that are done in `place.out`, in the order of the grid."""
    rows = _Rows(grid, place).all()
    if not rows:
        raise UserError(f"no run of this grid is finished in {place.out}")
    return rows


class _Rows:
    """The rows of what is done, in the order of the grid."""

    def __init__(self, grid: Grid, place: Place) -> None:
        self._grid, self._place = grid, place
        self._rows: dict[Run, dict[str, Any]] = {}
        self.take(grid.runs)

    def take(self, runs: Sequence[Run]) -> None:
        """Read the rows of those of `runs` that are done."""
        self._rows |= {run: row for run in runs if (row := row_of(run, self._place.out)) is not None}

    def all(self) -> list[dict[str, Any]]:
        """Every row known."""
        return [self._rows[run] for run in self._grid.runs if run in self._rows]


class _Progress:
    """A bar on a terminal; elsewhere one line a run."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn(), TextColumn("{task.fields[last]}"))  # fmt: skip
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done, last="")
        self._console, self._total, self._done, self._begun = console, total, done, time.monotonic()

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def tell(self, run: Run, row: dict[str, Any] | None, error: str | None) -> None:
        """One run has ended."""
        self._done += 1
        said = f"failed: {error}" if row is None else f"{row['accuracy']:.1f} % in {row['seconds']:.0f} s"
        self._bar.update(self._task, completed=self._done, last=f"{run.name}: {said}")
        if row is None or not self._console.is_terminal:
            spent = time.monotonic() - self._begun
            self._console.print(
                f"[{self._done} of {self._total}, {spent:.0f} s] {run.name}: {said}", highlight=False, markup=False
            )
