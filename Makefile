# make test installs what it needs into .venv, then runs; nothing outside the folder is touched.
PYTHON ?= python3
# A user with a GPU may point this at a CUDA build, e.g. TORCH="torch==2.13.0 --index-url …"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install check fmt test test-slow tables clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev]'
	touch $@

# What CI runs before the tests: style, types, and which folder may import which.
check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

fmt: $(STAMP)
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Rewrites the tables in README.md and docs from results/*.jsonl.
tables: $(STAMP)
	$(BIN)/python tools/tables.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
