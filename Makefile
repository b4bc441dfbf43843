# Every target sets itself up from a fresh clone: it needs make and Python 3.11 or newer, nothing else.
#
#   make demo           train, resume, sample and score a small model; pages in out/demo   (LONG=1: up to two hours)
#   make test           lint and the whole test suite; without Chromium, the web page is left out
#   make lint           formatting, lint, types, and which room may import which
#   make bench          speed and memory beside a PyTorch peer
#
# Variables: PYTHON (the interpreter that makes .venv), WORKERS (test processes), TESTS (files or pytest options).

PYTHON ?= python3
WORKERS ?= 2
TESTS ?=
LONG ?=

# Of what the Makefile runs: the test extra brings the TPU compiler, which would otherwise look for a TPU.
export JAX_PLATFORMS ?= cpu

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/installed
	@$(BIN)/python -m svg_jax.demo --out out/demo $(if $(filter-out 0,$(LONG)),--long)

# pytest comes last, so that its summary ends the output.
test: lint
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(TESTS)

lint: $(VENV)/installed
	@$(BIN)/ruff format --check --output-format concise .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(VENV)/installed
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/installed-bench
	@$(BIN)/python -m benchmarks.train_step
	@$(BIN)/python -m benchmarks.autoencoder
	@$(BIN)/python -m benchmarks.attention
	@$(BIN)/python -m benchmarks.sampling
	@$(BIN)/python -m benchmarks.data
	@$(BIN)/python -m benchmarks.inception

clean:
	rm -rf $(VENV) out build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("svg_jax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": name another one, as in make PYTHON=python3.12")'
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[test,demo]"
	@# Gradio asks for Pillow below 13 and runs with it; crops equal the release's to the byte from 13 on.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "pillow>=13.0.0" 2>/dev/null
	@touch $@

$(VENV)/installed-bench: $(VENV)/installed
	@echo "Installing PyTorch and diffusers into $(VENV), to compare with"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[bench]"
	@touch $@
