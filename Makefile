# Every target sets itself up once, in a local virtual environment, and says what it does.
PYTHON ?= python3
BIN := .venv/bin
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: demo test test-all check docs bench clean

demo: .venv/.base  ## estimate tail risks of the embedded model, beside the exact truth
	$(BIN)/tailrisk demo

test: .venv/.dev  ## run the tests
	$(BIN)/pytest -n 2 --dist loadfile

test-all: .venv/.dev  ## run the tests, the slow ones too
	$(BIN)/pytest -n 2 --dist loadfile -m "slow or not slow"

check: .venv/.dev  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/.dev  ## build the documentation, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "Built: site/index.html; read it at http://localhost:8000 with $(BIN)/mkdocs serve"

bench: .venv/.dev  ## measure throughput against PyTorch peers
	$(BIN)/python experiments/throughput/run.py

.venv/bin/python:
	@echo "Making a virtual environment in .venv"
	$(PYTHON) -m venv .venv

.venv/.base: pyproject.toml | .venv/bin/python
	@echo "Installing tailrisk_jax into .venv"
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "Installing tailrisk_jax with its test and lint tools into .venv"
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ .venv/.base

clean:  ## remove the virtual environment and caches
	rm -rf .venv .cache site
