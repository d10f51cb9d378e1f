"""The command line: `fastlora train | eval | info | demo`.

What a user can put right is one line on stderr and exit code 2, found before models or images are loaded where it can be.
"""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .config import ENCODERS, LAYERS, SCALINGS, TARGETS, LoRAConfig
from .fewshot.errors import Interrupted, UserError
from .fewshot.recipe import METHODS, PRECISIONS, Recipe

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["app", "main"]

app = typer.Typer(
    name="fastlora",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

T = TypeVar("T")
PAPER = "a photo of a {}."
DATA_HELP = "A folder with one sub-folder a class (or train/ and test/ of such), a known set (caltech101), or digits."
DEVICE_HELP = "auto (the GPU where there is one), cpu, cuda, cuda:1, …"

# Typer does not export the base of its usage errors, and has its own copy of click since 0.2x.
UsageError: type[Any] = typer.BadParameter.mro()[2]


def main() -> None:
    """The entry point: runs the command and turns what a user can put right into one line and exit code 2."""
    sys.exit(_guarded(lambda: app(standalone_mode=False)))


def _guarded(command: Callable[[], Any]) -> int:
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except typer.Abort:
        return 130
    except UsageError as error:
        return _complain(error.format_message().replace("\n", " "), error.exit_code)
    except UserError as error:
        return _complain(str(error), 2)
    except Interrupted as stop:
        return _complain(str(stop), stop.exit_code)
    except MemoryError as error:
        return _complain(str(error) or "out of memory", 2)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {error.filename}" if error.filename else ""
            return _complain(f"no space left{where}: free some and go on with --resume", 2)
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            return _complain(f"{error.strerror}: {error.filename}", 2)
        raise


def _complain(message: str, code: int) -> int:
    print(f"fastlora: {message}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def root_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Adapt CLIP to your images by LoRA, from a few labelled ones per class."""
    if version:
        from . import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for everything the run leaves behind.")],
    shots: Annotated[int, typer.Option(help="Labelled images per class to train on.")] = Recipe.shots,
    model: Annotated[str, typer.Option(help="An open_clip model, or mini, which comes with fastlora.")] = Recipe.model,
    pretrained: Annotated[
        str, typer.Option(help="An open_clip tag or a checkpoint file; none for random weights. mini has its own.")
    ] = "openai",
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}; the last three for comparison.")] = Recipe.method,
    seed: Annotated[int, typer.Option(help="Of the images drawn, their order and crops, the adapters, dropout.")] = Recipe.seed,
    rank: Annotated[int, typer.Option(help="Rank of each update, 1 to 128.")] = LoRAConfig.rank,
    alpha: Annotated[float, typer.Option(help="Numerator of the scaling.")] = LoRAConfig.alpha,
    dropout: Annotated[
        float, typer.Option(help="Probability of dropping an input of the LoRA branch, in [0, 1).")
    ] = LoRAConfig.dropout,
    scaling: Annotated[str, typer.Option(help=f"The factor before B(Ax): {' or '.join(SCALINGS)}.")] = LoRAConfig.scaling,
    targets: Annotated[str, typer.Option(help=f"Adapted projections, with commas, of {', '.join(TARGETS)}.")] = ",".join(
        LoRAConfig.targets
    ),
    encoders: Annotated[str, typer.Option(help="Adapted encoders, with commas, of vision, text.")] = ",".join(ENCODERS),
    layers: Annotated[str, typer.Option(help=f"{', '.join(LAYERS)}, or block numbers from 0 with commas: 0,1,11.")] = str(
        LoRAConfig.layers
    ),
    template: Annotated[
        str | None, typer.Option(help=f'The prompt, {{}} for the class name.  [default: the data set\'s own, mostly "{PAPER}"]')
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Optimizer steps.  [default: 500 a shot]")] = None,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = Recipe.batch_size,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.  [default: 2e-4; 1e-5 for full fine-tuning]")] = None,
    lr_min: Annotated[float, typer.Option(help="Where the cosine schedule ends.")] = Recipe.lr_min,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = Recipe.weight_decay,
    betas: Annotated[tuple[float, float], typer.Option(help="AdamW's betas.")] = Recipe.betas,
    crop_scale: Annotated[
        tuple[float, float], typer.Option(help="Smallest and largest share of the area that a training crop takes.")
    ] = Recipe.crop_scale,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Mirror half of the training images.  [default: yes; digits: no]")
    ] = None,
    max_side: Annotated[
        int, typer.Option(help="Training images with a longer shorter side, in pixels, are shrunk once.")
    ] = Recipe.max_side,
    precision: Annotated[
        str, typer.Option(help=f"{', '.join(PRECISIONS)}; auto is bf16 on a GPU that has it, else fp16, on the CPU fp32.")
    ] = Recipe.precision,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    root: Annotated[Path, typer.Option(help="Folder that holds the known sets.")] = Path("data"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the stopped run in RUN.")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 60.0,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints, besides the seconds.")] = None,
) -> None:
    """Adapt a model to DATA and write adapter, metrics and report.html to RUN. The defaults are CLIP-LoRA's recipe."""
    lora = _valid(
        lambda: LoRAConfig(
            rank=rank, alpha=alpha, dropout=dropout, targets=_names(targets), encoders=_names(encoders),
            layers=_layers(layers), scaling=scaling,
        )
    )  # fmt: skip
    recipe = _valid(
        lambda: Recipe(
            model=model, pretrained=_pretrained(model, pretrained), method=method, shots=shots, iterations=iterations,
            batch_size=batch_size, lr=lr, lr_min=lr_min, weight_decay=weight_decay, betas=betas, template=template,
            crop_scale=crop_scale, flip=flip, max_side=max_side, seed=seed, precision=precision, lora=lora,
        )
    )  # fmt: skip
    from .fewshot import datasets
    from .fewshot.runfolder import RunFolder, identity

    # the trainer checks all of it again; here nothing heavy is loaded yet
    RunFolder(out).check(identity(recipe, data), resume)
    datasets.find(data, root)
    from .fewshot import trainer

    again = shlex.join(["fastlora", *sys.argv[1:], *([] if resume else ["--resume"])])
    job = trainer.Job(recipe, data, out, root, device, resume, checkpoint_seconds, checkpoint_steps, again)
    trainer.run(job, _console())


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json, predictions.csv, report.html.  [default: none written]")
    ] = None,
    template: Annotated[str | None, typer.Option(help="The prompt.  [default: the run's]")] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    root: Annotated[Path, typer.Option(help="Folder that holds the known sets.")] = Path("data"),
) -> None:
    """Test the model that RUN adapted on DATA: its test images, or in a plain folder all that RUN did not train on."""
    from .fewshot.runfolder import RunFolder

    if template is not None:
        _valid(lambda: Recipe(template=template))
    folder = RunFolder(run)
    folder.read_config()
    if out is not None and RunFolder(out).metrics.exists():
        raise UserError(f"--out {out} holds another result: choose another folder")
    from .fewshot import evalrun

    evalrun.run(folder, data, root, device, out, template, _console())


@app.command()
def info() -> None:
    """Versions, devices, and the backend that calls get here, with the reason."""
    import platform

    import torch
    from rich.table import Table

    from . import backend
    from .fewshot.summary import package_version

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("fastlora", package_version("fastlora"))
    table.add_row("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    table.add_row("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'}, HIP {torch.version.hip or 'none'})")
    for name in ("triton", "open_clip_torch", "torchvision", "safetensors", "xformers"):
        table.add_row(name, package_version(name))
    table.add_row("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, sm_{found.major}{found.minor}")
    if not torch.cuda.is_available():
        table.add_row("gpu", "none that torch can use")
    for name, reason in backend.describe().items():
        table.add_row(f"backend on {name}", reason)
    _console().print(table)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder for the run; a demo there before is replaced.")] = Path(
        "fastlora-demo"
    ),
    iterations: Annotated[int, typer.Option(help="Optimizer steps; the paper's recipe has 8000 for 16 shots.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the images drawn, their order and crops, the adapters, dropout.")] = 1,
) -> None:
    """Adapt the mini CLIP to handwritten digits, 16 of each, in at most three minutes on two cores."""
    from .fewshot import demo

    demo.run(out, iterations, seed, _console())


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def _valid(make: Callable[[], T]) -> T:
    """What `make` makes; a ValueError of its own checks becomes the user's."""
    try:
        return make()
    except ValueError as error:
        raise UserError(str(error)) from error


def _names(text: str) -> tuple[str, ...]:
    """ "q,k v" -> ("q", "k", "v")."""
    return tuple(text.replace(",", " ").split())


def _layers(text: str) -> str | tuple[int, ...]:
    parts = _names(text)
    if parts and all(part.isdecimal() for part in parts):
        return tuple(int(part) for part in parts)
    return text


def _pretrained(model: str, pretrained: str) -> str | None:
    """mini has weights of its own; other models take a tag, a file, or none."""
    if model == "mini":
        if pretrained not in ("openai", "none"):
            raise ValueError(f"--pretrained {pretrained} does not go with --model mini, which has weights of its own")
        return None
    return None if pretrained == "none" else pretrained
