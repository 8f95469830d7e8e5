# Everything happens in .venv, which the first call makes; remove the folder to start afresh.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
WORKERS ?= 2

.PHONY: demo test check
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/mmgrpo demo image

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow"
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow

check: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: several gigabytes the first time, some minutes"
	$(INSTALL) --editable .
	@$(INSTALL) 'pesq>=0.0.4' || echo "PESQ is left out: it comes as source and needs a C compiler; all else works"
	@touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	@touch $@
