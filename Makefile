# Targets create the virtual environment on first use and again when its inputs change.
VENV ?= .venv
PYTHON ?= python3
# Tested versions: constraints.txt (the CUDA build of torch that pip installs) or constraints-cpu.txt.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,bench,lint,processor,docs,ray
TESTS ?= tests
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= $(or $(OUT),bench/results)
# Versions of Triton that `make kernels` compiles with; "newest" is the latest release.
TRITONS ?= 3.6.0 3.7.1 3.8.0 newest

.PHONY: demo test test-fast bench lint docs kernels gpu train-builtin tune clean

demo: $(STAMP)  ## compare the stock with the patched pipeline and write a contact sheet, out/demo.png
	$(BIN)/uniref-fast demo --out out/demo.png

test: $(STAMP)  ## run all tests on two workers; TESTS="tests/test_edit.py ..." selects files
	$(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

test-fast: $(STAMP)  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(TESTS)

bench: $(STAMP)  ## run every benchmark on this machine, print a table and write JSON to $(RESULTS)
	$(BIN)/python -m pytest bench --benchmark-only --results $(RESULTS) --what bench

lint: $(STAMP)  ## check style, format and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(STAMP)  ## build the documentation as a site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

kernels: $(STAMP)  ## compile every Triton kernel for sm_80, sm_89, sm_90 and sm_100 with each of TRITONS and check the report
	set -e; for version in $(TRITONS); do \
	    folder=build/triton-$$version; rm -rf $$folder; \
	    $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $$folder \
	        triton$$([ $$version = newest ] || echo ==$$version); \
	    PYTHONPATH=$$folder $(BIN)/python -m uniref_fast.kernels.compile_matrix; \
	done

train-builtin: $(STAMP)  ## train the built-in model in under four hours; needs the Debian package fonts-noto-color-emoji
	$(BIN)/python -m uniref_fast.training.builtin.make --out runs/builtin

tune: $(STAMP)  ## measure the cost of attention on this machine: uniref_fast/assets/tuned/<device>.json
	$(BIN)/python bench/autotune.py

gpu:  ## run what bench/GPU_TODO.md asks for on a machine with a CUDA device, in order, within 12 minutes
	$(PYTHON) bench/harvest.py --out $(RESULTS)

# torch is installed first, so that no dependency picks another build
$(STAMP): pyproject.toml $(wildcard constraints*.txt) setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv* build *.egg-info uniref_fast/_native*.so out
