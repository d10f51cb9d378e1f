"""Name, version, dependencies, and the one mapping: folder kernels/ -> package fastlora.kernels."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

# torch 2.11 is the oldest on which the suite was run: varlen attention's arguments and library ops have this form since then.
# triton 3.6 is what torch 2.11 ships. Everything else takes any version that pip finds fit.
DEPENDENCIES = [
    "torch>=2.11",
    "triton>=3.6; sys_platform == 'linux'",
    "open_clip_torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "typer",
    "rich",
    "filelock>=3.32",  # one owner of a run folder; since 3.32 removing the lock's file is left to its holder
    "scikit-learn",  # its digits are the data set of `fastlora demo`; its logistic regression is the linear probe
    "matplotlib",
    "tensorboard",
    "pyyaml",  # the grids of `fastlora sweep`
]
EXTRAS = {
    "xformers": ["xformers>=0.0.35"],  # the first that does not pin a torch older than ours
    "transformers": ["transformers"],
    "timm": ["timm"],
    "peft": ["peft"],
    "ray": ["ray"],
    "datasets": ["datasets"],  # Hugging Face sets as DATA
    "parquet": ["pyarrow"],  # tables of images, and the rows of a sweep
    "dev": ["accelerate", "build", "hypothesis", "lightning", "mypy", "pytest", "pytest-benchmark", "pytest-xdist", "ruff"],
}
# what the tests hold the library against: the suite runs with every host and every format
EXTRAS["dev"] += [name for extra in ("transformers", "timm", "peft", "ray", "datasets", "parquet") for name in EXTRAS[extra]]
# on Linux its wheels are for x86 alone; elsewhere pip would compile it, against a torch that its build does not see
EXTRAS["dev"] += [f"{name}; sys_platform == 'linux' and platform_machine == 'x86_64'" for name in EXTRAS["xformers"]]

setup(
    name="fastlora-clip",  # on the package index `fastlora` is another author's; what one imports is fastlora
    version="0.1.0",
    description="Fused LoRA for CLIP: Triton kernels, and few-shot training without waste",
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",  # the versions the suite was run on
    packages=[*find_packages(include=["fastlora", "fastlora.*"]), "fastlora.kernels"],
    # PyPI's `kernels`, which transformers imports, owns the top-level name: ours lives under fastlora.
    package_dir={"fastlora.kernels": "kernels"},
    package_data={
        "fastlora": ["py.typed", "mini/*.json", "mini/*.safetensors", "mini/*.md"],
        "fastlora.fewshot.sweep": ["paper.json", "presets/*.yaml"],
    },
    # a plain C library, found by its path: fastlora.cpu. Without a C compiler torch's own products serve.
    ext_modules=[
        Extension(
            "fastlora.kernels._cpu",
            [f"kernels/{name}.c" for name in ("cpu", "thin", "short_attention")],
            depends=[f"kernels/{name}.h" for name in ("cpu", "each_width", "vectors")],
            extra_compile_args=["-O3", "-pthread"],
            libraries=["m"],
            optional=True,
        )
    ],
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastlora = fastlora.cli:main"]},
)
