# Each target makes what it needs: the virtual environment is built on first use and rebuilt when its inputs change.
VENV ?= .venv
PYTHON ?= python3
# The tested sets of versions: constraints.txt (the CUDA build of torch that pip installs) and constraints-cpu.txt.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,bench,lint,processor,docs
TESTS ?= tests
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= $(or $(OUT),bench/results)
# Versions of Triton that `make kernels` compiles with; "newest" is the newest release.
TRITONS ?= 3.6.0 3.7.1 3.8.0 newest

.PHONY: demo test bench lint docs kernels gpu train-builtin tune clean

demo: $(STAMP)  ## stock against patched pipeline on a composed scene: out/demo.png
	$(BIN)/uniref-fast demo --out out/demo.png

test: $(STAMP)  ## the test suite, on two workers; TESTS="tests/test_edit.py ..." selects files
	$(BIN)/python -m pytest -n 2 $(TESTS)

bench: $(STAMP)  ## every benchmark on this machine, side by side: a table, and JSON in $(RESULTS)
	$(BIN)/python -m pytest bench --benchmark-only --results $(RESULTS) --what bench

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: $(STAMP)  ## the documentation as a site: build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

kernels: $(STAMP)  ## compile every Triton kernel for sm_80, sm_90 and sm_100 with each of TRITONS and check the report
	set -e; for version in $(TRITONS); do \
	    folder=build/triton-$$version; rm -rf $$folder; \
	    $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $$folder \
	        triton$$([ $$version = newest ] || echo ==$$version); \
	    PYTHONPATH=$$folder $(BIN)/python -m uniref_fast.kernels.compile_matrix; \
	done

train-builtin: $(STAMP)  ## the built-in model from nothing, under four hours; wants the Debian package fonts-noto-color-emoji
	$(BIN)/python -m uniref_fast.training.builtin.make --out runs/builtin

tune: $(STAMP)  ## measure this machine's attention costs: uniref_fast/assets/tuned/<device>.json
	$(BIN)/python bench/autotune.py

gpu:  ## on a machine with a CUDA device: what bench/GPU_TODO.md asks for, in order, within 12 minutes
	$(PYTHON) bench/harvest.py --out $(RESULTS)

# torch first: so that no other package's dependency picks another build of it
$(STAMP): pyproject.toml $(wildcard constraints*.txt) setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv* build *.egg-info uniref_fast/_native*.so out
