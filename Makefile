# `make up` starts Heed on this machine; `make test` tests it. Both begin from a fresh clone and prepare what they need.
#
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu   another index for torch (default: the platform's usual build)
#   PYTHON=python3.12                                  another Python, 3.11 or newer (default: the first one found)

VENV := .venv
BIN := $(VENV)/bin
TORCH := torch~=2.13.0
TORCH_INDEX ?=
PYTHON ?=
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check

.PHONY: help up test lint format docs bench bench-learn bench-learn-peers bench-gold bench-serving bench-swaps bench-turns bench-decode bench-ingest soak faults clean
.DEFAULT_GOAL := help

help: ## say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

up: $(VENV)/.heed ## start chat server and learner on this machine
	@exec $(BIN)/heed up

test: $(VENV)/.heed-test ## run the tests
	$(BIN)/python -m pytest

lint: $(VENV)/.heed-test ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.heed-test ## put imports and layout in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.heed-test ## the documents as a site, into build/site; wrong links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: bench-learn bench-learn-peers bench-gold bench-serving bench-swaps bench-turns bench-decode bench-ingest ## run the benchmarks (hours; finished parts are kept)

bench-learn: $(VENV)/.heed-test ## how fast and how well it learns from thumbs (resumable)
	$(BIN)/python -m benchmarks.learn_live

bench-learn-peers: $(VENV)/.heed-test ## how well and how fast it learns beside TRL (which it installs: gigabytes; resumable)
	$(BIN)/python -m benchmarks.learn

bench-gold: $(VENV)/.heed-test ## whether what people really want ever suffers: 30 updates in a row, three times (resumable)
	$(BIN)/python -m benchmarks.gold

bench-serving: $(VENV)/.heed-test ## how fast it serves, beside other servers (which it installs: gigabytes)
	$(BIN)/python -m benchmarks.serving

bench-swaps: $(VENV)/.heed-test ## what a swap costs those who talk meanwhile
	$(BIN)/python -m benchmarks.swaps

bench-turns: $(VENV)/.heed-test ## what the prefix cache is worth to the next turn of a conversation
	$(BIN)/python -m benchmarks.turns

bench-decode: $(VENV)/.heed-test ## how near a step comes to the memory's speed (on a GPU: an 8B shape)
	$(BIN)/python -m benchmarks.decode

bench-ingest: $(VENV)/.heed-test ## how much feedback a second is taken, beside a route that only validates it (KAFKA_LIBS: with Kafka)
	$(BIN)/python -m benchmarks.ingest

soak: $(VENV)/.heed-test ## the long versions of the tests that kill, cut off and fill up, and of those for leaks
	HEED_SOAK=1 $(BIN)/python -m pytest -m "" --timeout=7200 tests/test_kill9.py tests/test_log_crash.py \
	  tests/test_chaos.py tests/test_memory.py tests/test_learner_memory.py

faults: $(VENV)/.heed-test ## plant each fault of tests/faults.toml in a copy of the learner: a test must fail
	$(BIN)/python -m tests.plant

clean: ## remove what was installed and cached here (never heed-data)
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch first: its default build differs by platform, and an index of its own must not serve the other packages.
$(VENV)/.heed: pyproject.toml | $(BIN)/python
	@echo "Installing Heed into $(VENV) (the first time this fetches PyTorch: some minutes) ..."
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.heed-test: pyproject.toml | $(VENV)/.heed
	@echo "Installing what the tests need ..."
	@$(PIP) install --editable ".[test]"
	@touch $@

$(BIN)/python:
	@python=""; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Heed needs Python 3.11 or newer, found $$($(or $(PYTHON),python3) --version 2>&1). Install one, or: make PYTHON=/path/to/python3.11" >&2; exit 2; \
	fi; \
	echo "Making a virtual environment in $(VENV) with $$($$python --version) ..."; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
