# make demo and make test install what they need into .venv, then run; nothing outside the folder is touched.
PYTHON ?= python3
# A user with a GPU may point this at a CUDA build, e.g. TORCH="torch==2.13.0 --index-url …"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One process per core, each with one thread: the tests' tensors are tiny. A process takes about 1 GB.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

.PHONY: demo install check fmt browser test test-slow sanitize bench gpu accuracy tables clean

# The first command on a fresh machine: installs, then quantizes a tiny embedded model with every recipe.
demo: $(STAMP)
	rm -rf build/demo
	$(BIN)/resq demo --out build/demo

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/resq/backends/cpu/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11 or missing; name another one: make PYTHON=python3.12 …"; exit 1; }
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
	$(PYTEST) -m "not slow"

# A headless Chromium in build/browser, for the tests of the report.
browser: $(STAMP)
	$(BIN)/python tests/report/fetch_browser.py build/browser

test-slow: $(STAMP)
	$(PYTEST) -m slow

# The backend's tests against kernels built with the address and undefined-behaviour sanitizers; not those of memory,
# which the sanitizer holds on to, and of machine code.
SANITIZED := build/sanitize
sanitize: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -DRESQ_SANITIZE=ON -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build $(SANITIZED) --parallel 2
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 RESQ_TEST_NATIVE=$(CURDIR)/$(SANITIZED) \
	  $(BIN)/python -m pytest -p no:xdist tests/backends -m "not slow" -k "not machine_code and not no_more_memory"

# Speed beside the machine's limits and beside peers, in one run; an idle machine and half an hour. Appends rows.
BENCH := $(BIN)/resq bench --shape llama-3.2-1b --out results/speed.jsonl
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[bench]'
	$(BENCH) --prefill 512 --batch 1 --against rtn,torch-bf16,openvino,openvino-f32dq,llama.cpp
	$(BENCH) --prefill 2048 --batch 2 --rounds 2 --against openvino,openvino-f32dq
	$(BENCH) --prefill 128 --batch 8 --rounds 2 --against torch-bf16,openvino,openvino-f32dq
	$(BENCH) --prefill 512 --batch 1 --head-bits 4.5 --against openvino,openvino-f32dq

# On a fresh machine with a card: checks, measures and tunes in under nine minutes, into $OUT or build/gpu (tools/gpu.py).
gpu:
	$(PYTHON) tools/gpu.py

# Every recipe at 4 and 3 bits on the trained models beside the checkout: an hour on two idle cores. Goes on where it was.
WIKITEXT := ../shared/data/wikitext-2
accuracy: $(STAMP)
	for model in llama-5m qwen2-5m; do \
	  $(BIN)/resq compare ../shared/models/$$model --recipes all --bits 4,3 --jobs 2 --keep-checkpoints \
	    --calibration $(WIKITEXT)/wiki.train.first1MB.raw --windows 512 --rounding-windows 128 --window-length 256 \
	    --text $(WIKITEXT)/wiki.test.first400KB.raw --wikitext --out build/compare/$$model || exit; \
	done
	$(BIN)/python tools/collect.py build/compare/llama-5m build/compare/qwen2-5m

# Rewrites the tables in README.md and docs, and the picture, from results/*.jsonl.
tables: $(STAMP)
	$(BIN)/python tools/tables.py
	$(BIN)/python tools/figure.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
