"""`fastlora info`."""

from __future__ import annotations

from .app import app, console

__all__ = ["info"]


@app.command()
def info() -> None:
    """Versions, devices, and the backend that calls get here, with the reason."""
    import importlib.util
    import platform

    import torch
    from rich.markup import escape
    from rich.table import Table

    from .. import backend, cpu, verdicts
    from ..fewshot.summary import own_version, package_version

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path is not cut short
    table.add_row("fastlora", own_version())
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
    compiled = f"compiled, {cpu.lanes()} floats a vector" if cpu.available() else "not compiled: there was no C compiler"
    table.add_row("kernels on cpu", compiled)
    for name, reason in backend.describe().items():
        table.add_row(f"backend on {name}", reason)
    for index in range(torch.cuda.device_count() if importlib.util.find_spec("triton") else 0):
        for kind, finding in verdicts.book(torch.device("cuda", index)).rows():
            table.add_row(f"kernels on cuda:{index}", escape(f"{kind}: {finding}"))
    console().print(table)
