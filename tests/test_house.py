"""The rules of the house: what the package exports, what an import costs, which way imports flow, what the folders may hold."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastlora
from waiting import HANG

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = [
    "LoRAConfig",
    "__version__",
    "add_adapter",
    "delete_adapter",
    "disabled",
    "encode_image",
    "encode_text",
    "load",
    "lora_linear",
    "lora_parameters",
    "merge",
    "patch",
    "save",
    "set_adapter",
    "unmerge",
    "unpatch",
]

# Each row may import the rows below it, never one above: cli at the top, the pure functions at the bottom.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["bench"],
    ["fewshot"],
    ["checkpoint", "encoders", "mini"],
    ["patch"],
    ["adapters", "plan"],
    ["record"],
    ["beside"],
    ["hosts"],
    ["layers"],
    ["functional"],
    ["autograd"],
    ["backend"],
    ["fastest"],
    ["trust"],
    ["verdicts"],
    ["eager", "kernels"],
    ["reference", "products", "thin"],
    ["rng", "cpu", "budget", "progress"],
    ["config"],
]
RANK = {name: len(LAYERS) - i for i, row in enumerate(LAYERS) for name in row}
# These serve tests and benchmarks, or stand beside the chain; nothing in the chain may import testing.
ANYWHERE = {"testing", "", "__init__"}


def run_python(code: str) -> str:
    """What `code` prints in a fresh interpreter outside the repository; fails with its error if it raises."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=HANG)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_the_verbs_and_nothing_else() -> None:
    assert sorted(fastlora.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(fastlora, name) is not None


def test_version_is_the_installed_distributions() -> None:
    assert fastlora.__version__ == importlib.metadata.version("fastlora-clip")


def test_top_level_name_kernels_is_not_ours() -> None:
    """PyPI's `kernels` owns that name; ours is fastlora.kernels only."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or not str(spec.origin).startswith(str(ROOT))
    assert Path(str(importlib.util.find_spec("fastlora.kernels").origin)).parent.name == "kernels"  # type: ignore[union-attr]


def test_import_needs_no_triton_no_gpu_and_no_host_library() -> None:
    """`import fastlora` on a machine where these modules do not exist."""
    missing = ["triton", "open_clip", "timm", "transformers", "sklearn", "matplotlib", "typer", "rich", "torchvision"]
    print(run_python(f"import sys; sys.modules.update(dict.fromkeys({missing}))\nimport fastlora"))


def test_import_runs_nothing() -> None:
    """No GPU is asked for, no random number drawn, no file or log written, no warning given, no default changed."""
    out = run_python(
        "import sys, warnings, logging; warnings.simplefilter('error'); import torch\n"
        "state, threads, root = torch.random.get_rng_state(), torch.get_num_threads(), list(logging.getLogger().handlers)\n"
        "loaded = set(sys.modules)\n"
        "torch.cuda._lazy_init = lambda: sys.exit('import initialised CUDA')\n"
        "torch.cuda.is_available = lambda: sys.exit('import asked for a GPU')\n"
        "import fastlora\n"
        "assert torch.equal(state, torch.random.get_rng_state()) and threads == torch.get_num_threads()\n"
        "assert torch.get_default_dtype() is torch.float32 and root == logging.getLogger().handlers\n"
        "assert not torch.cuda.is_initialized()\n"
        "new = set(sys.modules) - loaded\n"
        "found = new & {'triton', 'open_clip', 'torchvision', 'typer', 'torch._dynamo', 'fastlora.fewshot'}\n"
        "assert not found, f'import fastlora imports {sorted(found)}'\n"
    )
    assert out == ""


def test_import_is_fast() -> None:
    """Half a second beyond torch's own import is far above what a few small files take, on a busy machine too."""
    code = "import torch, time; t = time.process_time(); import fastlora; print(time.process_time() - t)"
    assert min(float(run_python(code)) for _ in range(2)) < 0.5


def imported_modules(path: Path, package: str) -> set[str]:
    """The fastlora modules that a file imports, inside functions too, by the first name below `fastlora`; "" is the package."""
    found = set()
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, [base, node.module]))
            # `from . import rng` and `from fastlora import rng` name modules
            names = [f"{name}.{alias.name}" for alias in node.names] if name == "fastlora" else [name]
        else:
            names = [alias.name for alias in node.names]
        for full in names:
            if full.split(".")[0] == "fastlora":
                below = full.split(".")[1:2]
                found.add(below[0] if below and below[0] in RANK.keys() | ANYWHERE else "")
    return found


def sources() -> list[tuple[str, Path, str]]:
    """(name below fastlora, file, its package) of every module of the package, kernels/ included."""
    rows = []
    for folder, package in ((ROOT / "fastlora", "fastlora"), (ROOT / "kernels", "fastlora.kernels")):
        for path in sorted(folder.rglob("*.py")):
            below = path.relative_to(folder)
            dotted = ".".join([package, *below.parts[:-1]])
            name = "kernels" if package != "fastlora" else below.parts[0].removesuffix(".py")
            rows.append((name, path, dotted))
    return rows


@pytest.mark.parametrize(("name", "path", "package"), sources(), ids=lambda v: v.name if isinstance(v, Path) else str(v))
def test_imports_flow_one_way(name: str, path: Path, package: str) -> None:
    if name in ANYWHERE:
        return
    assert name in RANK, f"fastlora/{name} has no place in the order of imports: give it a row in LAYERS"
    for other in imported_modules(path, package):
        if other == name or (name == "cli" and other == ""):
            continue
        assert other != "testing", f"{path.name} imports fastlora.testing, which is for tests and benchmarks"
        assert other in RANK, f"{path.name} imports the package itself, which imports it"
        assert RANK[other] <= RANK[name], f"{path.name} imports {other}, which stands above it"


@pytest.mark.parametrize("name", ["reference", "rng", "config"])
def test_pure_modules_import_torch_only(name: str) -> None:
    tree = ast.parse((ROOT / "fastlora" / f"{name}.py").read_text())
    absolute = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else node.names[0].name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.level == 0)
    }
    assert absolute - set(sys.stdlib_module_names) <= {"torch"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_know_no_autograd_and_no_module(path: Path) -> None:
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not names & {"Module", "Function", "Parameter", "requires_grad", "backward_hooks"}


def test_every_public_function_has_a_docstring_and_annotations() -> None:
    for name, path, _ in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring ({name})"


def texts() -> Iterator[tuple[str, str]]:
    """(name, content) of each text file that is in git or may get there."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for file in filter(None, listed):
        path = ROOT / file
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".json", ".jsonl", ".sh", ".txt", ""} and path.is_file():
            yield file, path.read_text(encoding="utf-8", errors="ignore")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing says which files are ours")
def test_no_file_names_a_package_index_or_a_machine_path() -> None:
    """A clone must work anywhere: nothing in it points at one machine or one index."""
    # Put together here so that this file does not name them itself.
    forbidden = ["/" + "work/", "/" + "root/", "pypi" + ".org", "index" + "-url", "find" + "-links"]
    for file, text in texts():
        assert not [word for word in forbidden if word in text], f"{file} names {[w for w in forbidden if w in text]}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing says which files are ours")
def test_no_text_installs_us_from_an_index() -> None:
    """`fastlora` is another author's there, and fastlora-clip anybody's as long as it is not published."""
    command = r"\b(pip3?|pipx|uv|poetry|pdm|conda)\b[^\n`]*\b(install|add|download)\b[^\n`]*[\s'\"]fastlora(-clip)?(?![\w/-])"
    installs = re.compile(command + r"|\bfastlora(-clip)?\[\w")
    found = {file: hit[0] for file, text in texts() if (hit := installs.search(text))}
    assert not found
