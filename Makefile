PYTHON  ?= python3
WORKERS ?= 2

BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast lint format cov clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  (PYTHON=$(PYTHON) makes the environment, WORKERS=$(WORKERS) processes run the tests)"

# One stamp per set of extras: .venv/.ok-train holds [train], .venv/.ok-dev holds [dev].
.venv/.ok-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python >= 3.11 is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)." \
	    "Name another one, for example: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

install: .venv/.ok-train ## make the environment that runs and trains (.venv)
	@echo "Installed. Next: .venv/bin/edt, or: make demo"

demo: .venv/.ok-train ## train on real digits and look at the result (runs/demo)
	$(BIN)/edt demo --out runs/demo

# Beside the environment and not in it: where torchao is found, diffusers imports it or peft refuses it, by its version.
.venv/int8/.ok: .venv/.ok-dev
	$(BIN)/python -m pip install -q --no-deps --target .venv/int8 --upgrade $$(grep '^torchao==' constraints.txt)
	@touch $@

test: .venv/.ok-dev .venv/int8/.ok ## run every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
	OMP_NUM_THREADS=1 PYTHONPATH=.venv/int8 $(BIN)/python -m pytest -q tests/unit/test_sampling_precision.py -m "not slow"

test-fast: .venv/.ok-dev ## run the tests that take a few seconds at most
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

lint: .venv/.ok-dev ## check style, formatting, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports --no-logo

format: .venv/.ok-dev ## format the code and mend what can be mended by machine
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

cov: .venv/.ok-dev ## run every test and report the lines that none of them reaches
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --cov --cov-report=term --cov-report=xml

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage .coverage.* coverage.xml
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
