"""`fastlora sweep`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..fewshot.errors import UserError
from .app import DEVICE_HELP, app, console

__all__ = ["sweep"]

ENGINES = ("local", "ray")


@app.command(context_settings={"ignore_unknown_options": True})
def sweep(
    out: Annotated[Path, typer.Option(metavar="SWEEP", help="Folder for the runs, rows, tables and figures.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[GRID] [--OPTION VALUE]...", help="A YAML file; any option of `fastlora train`."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A grid that comes with fastlora: paper-table2, paper-ablation, base-to-new.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Data sets, with commas, as `fastlora train` takes them.")] = None,
    shots: Annotated[str | None, typer.Option(help="Numbers of images a class, with commas.", show_default="16")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, with commas.", show_default="1,2,3")] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that holds the known sets; several are looked through in order.", show_default="data"),
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    engine: Annotated[str, typer.Option(help="local, or ray: on every machine of a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="The Ray cluster; none starts one on this machine.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time with --engine ray.", show_default="one a GPU, or a core")
    ] = None,
    reports: Annotated[bool, typer.Option("--reports", help="A report.html for every run, too.")] = False,
    render: Annotated[bool, typer.Option("--render", help="Run nothing; tables and figures of what is done.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Check the grid and list its runs; run nothing.")] = False,
) -> None:
    """Carry out a grid of runs, once each, and render tables and figures beside the paper's.

    The grid comes from a YAML file, a preset, or flags, which come on top: --data, --shots, --seeds, and any option of
    `fastlora train` (--rank 2,4,8; --targets q,k,v --targets q). A stopped sweep goes on with the same command.
    """
    from ..fewshot.sweep import grid as grids

    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r}: choose from {', '.join(ENGINES)}")
    grid, options = grids.from_flags(arguments or [])
    if grid is not None and preset is not None:
        raise UserError(f"give a grid file ({grid}) or --preset {preset}, not both")
    values: dict[str, Any] = {}
    where = "sweep"
    if preset is not None:
        values, where = grids.preset(preset), f"preset {preset}"
    elif grid is not None:
        values, where = grids.read(grid), f"grid {grid}"
    flags = {"data": data, "shots": shots, "seeds": seeds}
    values |= {name: grids.listed(name, text) for name, text in flags.items() if text is not None}
    values |= options
    if root:
        values["root"] = [str(folder) for folder in root]
    parsed = grids.parse(values, where)
    from ..fewshot.shared import Shared
    from ..fewshot.sweep import render as renderer
    from ..fewshot.sweep import runner
    from ..fewshot.sweep.execute import Place

    place = Place(out, parsed.roots, device, reports, shlex.join(["fastlora", *sys.argv[1:]]))
    screen = console()
    if show:
        runner.check(parsed, place, Shared())
        for run in parsed.runs:
            print(f"{run.name}  {run.label}")
        return
    rows = runner.finished(parsed, place) if render else runner.sweep(parsed, place, screen, _engine(engine, address, workers))
    renderer.render(rows, parsed.title, out, screen)


def _engine(name: str, address: str | None, workers: int | None) -> Any:
    if name == "local":
        if address is not None or workers is not None:
            raise UserError("--address and --workers go with --engine ray")
        return None
    from ..fewshot.sweep import on_ray

    return on_ray.engine(address, workers)
