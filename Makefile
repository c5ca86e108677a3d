# Everything a fresh machine needs is set up by the first target that needs it: a virtual environment in .venv, pinned by
# constraints.txt, or by what CONSTRAINTS names.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
FAMILY ?= llama
# One thread a process: on small machines that is faster than several, and the tests run in several processes.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-only test-all check format docs bench clean
help:
	@echo "make demo        train a tiny seed and three specialists, merge them, compare (FAMILY=cohere2: parallel block)"
	@echo "make test        format, lint, types and the tests"
	@echo "make test-only   the tests alone"
	@echo "make test-all    the slow tests: other library versions, the wheel"
	@echo "make bench       the merge against cat and against peers that are installed"
	@echo "make format docs rewrite the code's format, docs/cli.md"

setup: .venv/ready
.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/upcycle demo --family $(FAMILY)

test: check test-only

test-only: setup
	$(BIN)/python -m pytest -n 2

test-all: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m typer upcycle.cli.main utils docs --name upcycle --title "The command line" --output docs/cli.md

bench: setup
	$(BIN)/python benchmarks/merge.py

clean:
	rm -rf .venv .demo build *.egg-info
