# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types docs bench gpu-report install fuzz soak sweep
.DEFAULT_GOAL := demo

demo: .venv/installed
	$(BIN)/python examples/federated_cifar100.py --out runs/demo

test: lint types
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

docs: .venv/installed  # the site, into site/
	$(BIN)/mkdocs build --strict

bench: .venv/installed
	$(BIN)/python -m pytest benchmarks --benchmark-only

FILES ?= 2000
KILLS ?= 1000
SEED ?= 0

fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz.run --files $(FILES) --seed $(SEED)

soak: .venv/installed
	$(BIN)/python -m tests.soak.run --kills $(KILLS) --seed $(SEED)

sweep: .venv/installed  # adapts 146 models, and writes docs/reference/models.md
	$(BIN)/python -m tests.sweep.run

# With the environment of the machine where there is no .venv, since a machine with a GPU may have no network.
GPU_PYTHON := $(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON))

gpu-report:
	$(GPU_PYTHON) -c "import hilora.kernels" || $(GPU_PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(GPU_PYTHON) -m benchmarks.gpu_report

install: .venv/installed

.venv/installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
