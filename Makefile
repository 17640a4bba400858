# Everything a developer runs. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
BIN := .venv/bin
STAMP := .venv/.complete
# Tests run in so many processes; one on the real model takes up to 2 GB.
WORKERS ?= 2
PYTEST_FLAGS ?=
# More threads than processors wait for each other, and spin while they do.
THREADS := $(shell threads=$$(($$(nproc) / $(WORKERS))); echo $$((threads > 0 ? threads : 1)))
PYTEST = OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile \
  --no-loadscope-reorder $(PYTEST_FLAGS)

# The native library is built by pip; these files make the set-up stale.
NATIVE := CMakeLists.txt $(shell find plugins/csrc -type f)
CXX_FILES := $(shell find plugins/csrc tests/native -name '*.cc' -o -name '*.h' -o -name '*.inl')

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | sed -E 's/^([a-z0-9-]+):.*## (.*)/  \1\t\2/' | expand -t 20

.PHONY: setup
setup: $(STAMP) ## make .venv with everything (on a bare Debian, as root, system packages too)

$(STAMP): pyproject.toml constraints.txt src/eoracc/__init__.py $(NATIVE)
	@.ci/system-packages "$(PYTHON)"
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[cpu,dev,lm-eval,plot,serve]'
	@touch $@

# The extras tensorrt-rtx and triton, 340 MB: they build for GPUs on machines that have none. The
# last one is the Python part of TensorRT, which plugins are tested with.
$(STAMP)-gpu: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt tensorrt-rtx triton tensorrt-cu13-bindings
	@touch $@

.PHONY: setup-gpu
setup-gpu: $(STAMP)-gpu ## add what builds TensorRT engines and GPU kernels

.PHONY: demo
demo: setup ## compress SmolLM2-135M to 3 bits, print the table, generate text
	$(BIN)/python examples/smollm2/demo.py

.PHONY: test
test: setup-gpu ## all tests, those on the real model and of GPU packages included
	EORACC_REQUIRE_GPU_PACKAGES=1 $(PYTEST)

.PHONY: test-fast
test-fast: setup ## unit tests only; those of GPU packages skip where these are missing
	$(PYTEST) -m 'not real'

.PHONY: check
check: setup ## one file: make check F=tests/passes/compensate/test_eora.py (or F=its source)
	@.ci/check '$(F)' $(PYTEST_FLAGS)

# The kernels without Python: configured in build/<name>, where $(1) are CMake's options.
NATIVE_BUILD = $(BIN)/cmake -S . -B build/$(1) -G Ninja -DEORACC_TESTS=ON \
  -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN)/ninja)" $(2) >/dev/null && $(BIN)/cmake --build build/$(1)

EMULATED := qemu-aarch64-static -L /usr/aarch64-linux-gnu

.PHONY: test-aarch64
test-aarch64: setup ## the AArch64 kernels, cross-compiled and emulated
	@.ci/aarch64-packages
	$(call NATIVE_BUILD,aarch64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++)
	$(EMULATED) -cpu cortex-a72 build/aarch64/check_kernels 150 0 scalar
	$(EMULATED) -cpu neoverse-n1 build/aarch64/check_kernels 150 1 neon_dotprod
	$(EMULATED) -cpu max build/aarch64/check_kernels 150 2 neon_i8mm

# Checks are calls, or GCC would take minutes over what is unrolled.
SANITIZERS := -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined \
  --param asan-instrumentation-with-call-threshold=0

.PHONY: test-sanitizers
test-sanitizers: setup ## kernels and op on random and malformed operands
	$(call NATIVE_BUILD,sanitizers,-DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="$(SANITIZERS)")
	build/sanitizers/check_kernels 200
	build/sanitizers/fuzz_operands
	.ci/sanitized $(BIN)/python -m tests.native.fuzz_op build/sanitizers/libeoracc_ops.so

# What tests/fuzz/test_mutations.py does with other seeds and for longer.
COUNT ?= 10000
SEED ?= 1

.PHONY: fuzz
fuzz: setup ## change files at random and read them: make fuzz COUNT=10000 SEED=1
	$(BIN)/python -m tests.fuzz.mutate --count $(COUNT) --seed $(SEED) --workers $(WORKERS)

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
bench: setup ## time the kernels; with ARTIFACTS="smollm2=DIR ..." whole models, too
	$(BIN)/python benchmarks/kernels.py
	$(if $(ARTIFACTS),$(BIN)/python benchmarks/decode.py $(addprefix --artifact ,$(ARTIFACTS)))

.PHONY: clean
clean: ## remove .venv and everything that was built
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
