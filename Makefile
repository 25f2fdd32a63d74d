# A fresh machine needs Python >= 3.11 and make; every target first builds .venv from the tested versions.
PYTHON ?= python3
# Test processes. Each runs torch on one thread (below), so two fill two cores.
JOBS ?= 2
BIN := .venv/bin
READY := .venv/.ready

# Nothing is downloaded from the Hugging Face hub: models are built from their configurations.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Worker processes with a thread pool each fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := test
.PHONY: demo test test-all lint format bench bench-gpu bench-tvm tvm-defaults gpu-page gates \
  coverage figures models results clean

demo: $(READY)
	$(BIN)/python examples/quickstart.py

test: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: lint
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS)

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)
	$(BIN)/python -m benchmarks.run cost kin speed upgrading --out benchmarks/results/

# Twenty minutes of one quiet core; on a GPU the models have about 10^9 parameters. A run that was stopped goes on
# where it was.
models: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m benchmarks.run models --out benchmarks/results/
	$(BIN)/python -m benchmarks.models_page

# Needs a GPU.
bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu rotation attention decoding --out benchmarks/results/

# Tunes programs of TVM for this CPU and times them, then whole models, whose table it writes; about eight minutes.
bench-tvm: $(READY)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.tvm --out benchmarks/results/
	$(ONE_THREAD) $(BIN)/python -m benchmarks.tvm_models --out benchmarks/results/

# Writes the winners that come with the package, for CPUs such as this one; about ten minutes.
tvm-defaults: $(READY)
	$(ONE_THREAD) $(BIN)/python -m grape_compile.tuning.shipping

# What they measured, as a page with figures.
gpu-page: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m benchmarks.gpu_page

# Compiles every kernel for three GPUs that need not be there, and writes down what each costs.
gates: $(READY)
	$(BIN)/python -m grape_compile.kernels.gates --output tests/kernels/gates.json

# Hours of one core: a run that was stopped goes on where it was; `make coverage FRESH=1` starts over.
coverage: $(READY)
	$(ONE_THREAD) $(BIN)/python -m benchmarks.coverage --jobs $(JOBS) $(if $(FRESH),,--resume)

# Half an hour of two quiet cores; a run that was stopped goes on where it was.
results: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python examples/train_tiny_lm.py --preset cpu --jobs $(JOBS) --figures docs/figures \
	  --results benchmarks/results/tiny_lm.json
	$(BIN)/python -m benchmarks.results_page

figures: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python examples/encoding_figures.py docs/figures

# The example that runs a library of TVM without Python; its runtime is that of the package.
TVM = $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('$(1)').submodule_search_locations[0])")
run_tvm: $(READY) examples/run_tvm.cpp
	ffi=$(call TVM,tvm_ffi); tvm=$(call TVM,tvm); $(CXX) -std=c++17 -O2 examples/run_tvm.cpp -o $@ \
	  -I$$ffi/include -L$$tvm/lib -L$$ffi/lib -Wl,-rpath,$$tvm/lib:$$ffi/lib \
	  -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: it is the large download, and one that fails should fail before anything else is done.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	  "Python 3.11 or newer is needed; " + sys.version.split()[0] + " was found. Name another: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cli,test,dev]'
	touch $@
