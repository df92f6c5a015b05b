# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-oldest compat lint types docs bench gpu-report install fuzz soak sweep
.DEFAULT_GOAL := demo

demo: .venv/installed
	$(BIN)/python examples/federated_cifar100.py --out runs/demo

test: lint types compat test-oldest
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# Kernels, torch.compile and export on the oldest torch: where tracing and Triton's code differ most.
OLDEST ?= .venv-oldest
COMPILED := $(addprefix tests/,adapters/test_by_weight.py adapters/test_injection.py adapters/test_mixed_passes.py \
	adapters/test_tools.py models/test_heads.py)

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m hilora.kernels.precompile --arch 90  # for all of them it takes as long as all else here
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal tests/kernels \
		--deselect tests/kernels/test_precompile.py::test_every_kernel_compiles_without_a_spill_for_every_architecture
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal $(COMPILED) -k "compile or export"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# Beside others: the oldest PEFT that can be imported with today's transformers, and a base that torchao has quantised.
BESIDE := peft==0.8.0 torchao

compat: .venv/beside
	PYTHONPATH=$< $(BIN)/python -m pytest --quiet tests/adapters/io/test_peft.py tests/adapters/test_quantised.py

.venv/beside: .venv/installed Makefile
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ $(BESIDE)
	touch $@

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

gpu-report:  # OUT=folder gathers what is to be carried home there
	$(GPU_PYTHON) -m benchmarks.gpu_report $(if $(OUT),--out "$(OUT)")

install: .venv/installed

.venv/installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

# By Python 3.12 where there is one, pyenv's too; else by that of the main environment.
$(OLDEST)/installed: tests/oldest.txt .venv/installed
	PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null | grep '^3\.12' | tail -n 1) python3.12 -m venv $(OLDEST) \
		|| $(BIN)/python -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --requirement tests/oldest.txt
	touch $@
