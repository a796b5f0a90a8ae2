# Every target makes its own environment in .venv from constraints.txt; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)

.PHONY: help install demo test lint format bench clean

help:
	@echo "make demo    simulate, train, generate, compare, draw: pictures in demo/plots (under 10 minutes on 2 cores)"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff, as in CI; make format applies it"
	@echo "make bench   all benchmarks"
	@echo "make install only the environment, in .venv"

# torch first: the pinned build, before another package asks for whatever is newest
$(VENV)/installed: pyproject.toml setup.py $(CONSTRAINTS)
	$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and 'hepzoo needs Python 3.10 to 3.13')"
	$(PYTHON) -m venv $(VENV)
	@echo "installing hepzoo and what it needs into $(VENV) (a few minutes)"
	$(PIP) "setuptools>=77" wheel torch
	$(PIP) --editable ".[dev]"
	touch $@

install: $(VENV)/installed

demo: install
	PATH="$(abspath $(BIN)):$$PATH" bash training/demo.sh demo

test: install
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: install
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: install
	$(BIN)/python benchmarks/tokenization.py
	$(BIN)/python benchmarks/generation.py --family cmhca_dirc
	$(BIN)/python benchmarks/training.py --family cmhca_dirc
	$(BIN)/python benchmarks/generation.py --family spade
	$(BIN)/python benchmarks/training.py --family spade
	$(BIN)/python benchmarks/generation.py --family omnijet
	$(BIN)/python benchmarks/training.py --family omnijet
	$(BIN)/python benchmarks/training.py --family fm4npp
	$(BIN)/python benchmarks/generation.py --family omnilearned
	$(BIN)/python benchmarks/training.py --family omnilearned
	$(BIN)/python benchmarks/generation.py --family epic_fm

clean:
	rm -rf $(VENV) demo build *.egg-info
