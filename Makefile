# `make demo` and `make test` need only Python 3.11+ and make; everything they install goes into .venv.
#   make PYTHON=python3.12 test      another Python
#   TORCH=torch==2.12.0 make test    another torch (see tools/install.py)

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The tests start hundreds of processes: where an environment forbids bytecode, each would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=
# Open MPI refuses to run as root (a container) unless told twice.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

# A file's tests stay in one process: they share worlds and references. In the order of collection: the longest
# files, of mpirun's tests, are the first.
ON_ALL_CORES := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-compositions test-mpi-% test-mpich test-vllm oracles test-gpu check-cuda sanitize-gpu check lint format wheel wheel-smoke faults soak bench clean

help:  ## this list
	@grep -E '^[a-z%-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt tools/install.py
	$(PYTHON) tools/install.py --venv $(VENV) --target "$(or $(firstword $(MAKECMDGOALS)),test)"
	@touch $@

setup: $(READY)  ## virtual environment with everything, and pre-commit hooks
	$(BIN)/pre-commit install

demo: $(READY)  ## a language model reads a long text on 4 ranks under a Helix plan
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 examples/long_context.py --plan "kvp2 tp2"

test: $(READY)  ## all tests that this machine can run, multi-process and mpirun ones too
	$(BIN)/python -m pytest $(ON_ALL_CORES)

test-compositions: $(READY)  ## every composition of axes in the table and many random plans against one process; every family of transformers; a host lost under torchrun
	$(BIN)/python -m pytest -m "table or not table" -o faulthandler_timeout=3600 tests/parallel/test_*compositions.py tests/parallel/test_elastic.py tests/parallel/test_every_family.py

test-mpi-%: $(READY)  ## the tests of tests/mpi on % ranks of mpirun
	$(BIN)/mpirun --oversubscribe -n $* $(BIN)/python -m pytest --with-mpi tests/mpi

MPICH_READY := .venv-mpich/.ready
$(MPICH_READY): tools/install_mpich.py $(READY)
	$(PYTHON) tools/install_mpich.py
	@touch $@

test-mpich: $(MPICH_READY)  ## the mpi backend on four ranks of MPICH, which has other handles than Open MPI (an environment of its own)
	.venv-mpich/bin/mpiexec -n 4 .venv-mpich/bin/python -m pytest --with-mpi -q -p no:cacheprovider tests/mpi

VLLM_READY := .venv-vllm/.ready
$(VLLM_READY): tools/install_vllm.py pyproject.toml
	$(PYTHON) tools/install_vllm.py
	@touch $@

test-vllm: $(VLLM_READY)  ## the plug-ins for vLLM, in a real engine on this CPU, and SGLang (an environment of its own)
	.venv-vllm/bin/python -m pytest -o faulthandler_timeout=3600 tests/vllm tests/sglang

oracles:  ## kvpress, torchao and ml_dtypes again, beside what the tests hold of them (an environment of its own)
	$(PYTHON) tools/check_oracles.py

CUDA_READY := .venv-cuda/.ready
$(CUDA_READY): tools/install_cuda.py pyproject.toml
	$(PYTHON) tools/install_cuda.py
	@touch $@

check-cuda: $(CUDA_READY)  ## compile every CUDA kernel, without a GPU: registers, spills, accesses (an environment of its own)
	.venv-cuda/bin/python -m pytest -o faulthandler_timeout=3600 tests/cuda_kernels/test_ptx_table.py

# One worker, renewed when a kernel's fault or a test without end has cost it its CUDA context (tests/conftest.py).
test-gpu: $(READY)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu -n 1 --max-worker-restart 20 -o faulthandler_timeout=300

sanitize-gpu: $(READY)  ## those of kernels again, under compute-sanitizer's memcheck and racecheck
	$(BIN)/python tools/sanitize_gpu.py

lint: $(READY)  ## format, lint, layers, spelling, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python

check: lint test  ## lint and test

format: $(READY)  ## rewrite the files as ruff wants them
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

wheel: $(READY)  ## build the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

wheel-smoke: wheel  ## install the wheel elsewhere and use it from another directory
	$(BIN)/python tools/wheel_smoke.py dist/*.whl

faults: $(READY)  ## kill the disk tier and a store on it, 500 times each; a thousand histories of failing tiers
	$(BIN)/python tests/kvstore/faults.py --kills 500
	$(BIN)/python tests/kvstore/store_faults.py --kills 500
	$(BIN)/python tests/kvstore/test_tiered_machine.py

soak: $(READY)  ## random collectives on four ranks, every result checked: 100,000 over shm, 10,000 over gloo and mpi
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 tests/soak.py --backend shm --calls 100000
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 4 tests/soak.py --backend gloo --calls 10000
	OMP_NUM_THREADS=1 $(BIN)/mpirun --oversubscribe -n 4 $(BIN)/python tests/soak.py --backend mpi --calls 10000

bench: $(READY)  ## benchmarks, as ratios against their peers
	$(BIN)/python -m plait bench

clean:  ## remove what make made
	rm -rf $(VENV) .venv-mpich .venv-vllm .venv-cuda .venv-oracles build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
