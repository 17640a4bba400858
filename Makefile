# Everything a developer runs. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
STAMP := .venv/.complete
PYTEST_FLAGS ?=

# The native library is built by pip; these files make the set-up stale.
NATIVE := CMakeLists.txt $(shell find plugins/csrc -type f)
CXX_FILES := $(shell find plugins/csrc -name '*.cc' -o -name '*.h' -o -name '*.inl')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

.PHONY: setup
setup: $(STAMP) ## make .venv with everything (on a bare Debian, as root, system packages too)

$(STAMP): pyproject.toml constraints.txt src/eoracc/__init__.py $(NATIVE)
	@.ci/system-packages "$(PYTHON)"
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[cpu,dev]'
	@touch $@

.PHONY: demo
demo: setup ## compress SmolLM2-135M to 3 bits, print the table, generate text
	$(BIN)/python examples/smollm2/demo.py

.PHONY: test
test: setup ## all tests, those on the real model included
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

.PHONY: test-fast
test-fast: setup ## unit tests only
	$(BIN)/python -m pytest -m 'not real' $(PYTEST_FLAGS)

.PHONY: lint
lint: setup ## ruff and clang-format, nothing is changed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

.PHONY: format
format: setup ## let ruff and clang-format rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: type
type: setup ## mypy, strict
	$(BIN)/mypy

.PHONY: bench
bench: setup ## time the kernels
	$(BIN)/python benchmarks/kernels.py

.PHONY: clean
clean: ## remove .venv and everything that was built
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
