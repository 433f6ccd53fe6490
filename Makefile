# make demo and make test are all a new machine needs; everything happens in .venv.
PYTHON ?= python3
VENV ?= .venv
# Any torch >= 2.10 will do; TORCH= keeps the one that is installed.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
MAX_JOBS ?= 2
export MAX_JOBS

BIN := $(VENV)/bin
STAMP := $(VENV)/.hypergrad_ext
# Tests run one thread each, so there is one process per core.
PYTEST := $(BIN)/python -m pytest -n $(MAX_JOBS) --dist loadgroup
# What runs again for every instruction set.
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,ops steps softmax lstm glm dense mlp wide convolutions plans panel_gemm sweeps))
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint bench build format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# setuptools, ninja and pybind11 are what the build needs when it is not isolated.
$(STAMP): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet $(TORCH) $(TRITON) "setuptools>=77" ninja "pybind11>=2.13"
	$(BIN)/python -m pip install --no-build-isolation --quiet -e ".[demo,test,bench,lint]"
	@touch $@

demo: $(STAMP) ## Set up, build, and run the main job on real data (results in out/)
	$(BIN)/python -m hypergrad_ext info
	$(BIN)/python -m hypergrad_ext demo --out out

# The kernels once more for every other instruction set that the CPU may be told to use, those for matrix units without
# them, and Triton's in its interpreter, which is switched on per process.
test: $(STAMP) ## Set up, build, and run all tests that take less than a minute
	$(PYTEST)
	own=$$($(BIN)/python -c "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"); \
	for isa in default avx2; do [ $$isa = $$own ] || ATEN_CPU_CAPABILITY=$$isa $(PYTEST) -q $(KERNEL_TESTS) -k "not torch and not triton" || exit 1; done
	HYPERGRAD_EXT_AMX=0 $(PYTEST) -q tests/test_wide.py
	TRITON_INTERPRET=1 $(PYTEST) -q tests/test_triton.py

test-slow: $(STAMP) ## Run the tests that take longer, without the CUDA compile gate
	$(PYTEST) -q -m slow --ignore=tests/test_cuda_compiles.py

lint: $(STAMP) ## Style, types, C++ format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy kernels
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: $(STAMP) ## Rewrite all files in the project's style
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

build: $(STAMP) ## Rebuild the extension in place (seconds after a small change)
	$(BIN)/python setup.py build_ext --inplace

bench: $(STAMP) ## Run the benchmarks (QUICK=1 for few rounds, SAVE=1 to keep the results)
	$(BIN)/python -m pytest bench -o addopts= -o python_files='bench_*.py' $(if $(QUICK),--quick) $(if $(SAVE),--save-results)

clean: ## Remove what was built
	rm -rf build dist out *.egg-info hypergrad_ext/*.so
