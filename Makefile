# make demo | test | bench | kernels | lint: each sets up .venv by itself on a fresh machine.
.PHONY: demo test bench kernels lint
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.fastlora-ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: $(STAMP)
	$(BIN)/fastlora demo

# Benchmarks have their own target; one worker a core, each with one thread, so that workers do not fight for cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -p no:benchmark $(ARGS)

bench: $(STAMP)
	$(BIN)/pytest benchmarks/ --benchmark-only $(ARGS)

kernels: $(STAMP)
	$(BIN)/python -m fastlora.kernels.compile $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): setup.py pyproject.toml $(wildcard kernels/*.[ch])
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit(f"fastlora needs Python 3.10 to 3.13, \
	this is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "setting up .venv: torch with its CUDA libraries is about 5.5 GB, a few minutes"
	@$(BIN)/python -m pip uninstall -qqq -y fastlora  # the distribution's name before it was fastlora-clip
	@$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@
