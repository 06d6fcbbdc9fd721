# Each target makes what it needs: the virtual environment is built on first use and rebuilt when its inputs change.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS ?= $(or $(OUT),bench/results)

.PHONY: demo test bench lint kernels gpu train-builtin tune clean

demo: $(STAMP)  ## stock against patched pipeline on a composed scene: out/demo.png
	$(BIN)/uniref-fast demo --out out/demo.png

test: $(STAMP)  ## the whole suite, on two workers
	$(BIN)/python -m pytest -n 2

bench: $(STAMP)  ## every benchmark of this machine, side by side: table, and JSON in $(RESULTS)
	mkdir -p build
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python bench/report.py build/bench.json --what bench --out $(RESULTS)

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

kernels: $(STAMP)  ## compile every Triton kernel for sm_80, sm_90, sm_100 and check the report; with the newest Triton too
	$(BIN)/python -m uniref_fast.kernels.compile_matrix
	rm -rf build/newest-triton
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target build/newest-triton triton
	PYTHONPATH=build/newest-triton $(BIN)/python -m uniref_fast.kernels.compile_matrix

train-builtin: $(STAMP)  ## the built-in model from nothing, under four hours; wants the Debian package fonts-noto-color-emoji
	$(BIN)/python training/builtin_model.py --out runs/builtin

tune: $(STAMP)  ## measure this machine's attention costs: uniref_fast/assets/tuned/<device>.json
	$(BIN)/python bench/autotune.py

gpu:  ## on a machine with a CUDA device and the package installed: the gpu suite, then the benches
	$(PYTHON) -m pytest -m gpu
	mkdir -p build
	$(PYTHON) -m pytest bench --benchmark-only --benchmark-json=build/bench.json
	$(PYTHON) bench/report.py build/bench.json --what bench --out $(RESULTS)

# torch first: so that no other package's dependency picks another build of it
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,bench,lint]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info uniref_fast/_native*.so out
