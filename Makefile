# make test | test-all | test-instruction-sets | lint | docs | sanitize | arm | kernels-report | triton-versions | demo |
#   bench | bench-avx2 | gpu | clean
#
# Each target creates the virtual environment it needs. To use another PyTorch: make test TORCH=torch==2.6.0

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO_VENV ?= .venv-demo
DEMO_OUT ?= runs/demo
BENCH_OUT ?= runs/bench

.PHONY: test test-all test-instruction-sets lint docs sanitize arm kernels-report triton-versions demo bench \
  bench-avx2 gpu clean FORCE

# Tests run in parallel, with one thread each. `make test` skips tests marked slow, most of which have faster
# tests of the same code; `make test-all` runs every test.
WORKERS ?= logical
PYTEST := $(VENV)/bin/pytest -n $(WORKERS) --maxprocesses 8 --dist load --maxschedchunk 2 --no-header
unexport PYTHONDONTWRITEBYTECODE # processes that tests start should not compile the package again

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/installed
	$(PYTEST)

# Runs the tests as on a processor without AVX-512, twice. Libraries are limited to AVX2. Our kernels are limited to
# AVX2 in the first run, and to portable C++ in the second, which ignores tests that do not use our CPU kernels.
# Inductor has a separate cache, because code that it compiled for AVX-512 gives wrong numbers when PyTorch is limited
# to AVX2.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell MKL_ENABLE_INSTRUCTIONS=AVX2 \
  TORCHINDUCTOR_CACHE_DIR=$(abspath build/inductor-avx2)
ELSEWHERE := $(addprefix --ignore=tests/test_, cuda.py packaging.py tiles.py triton.py)

test-instruction-sets: $(VENV)/installed
	$(AVX2) $(PYTEST) tests --instruction-set=avx2
	$(AVX2) $(PYTEST) tests --instruction-set=portable $(ELSEWHERE)

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy examples tests/typed_usage.py
	$(VENV)/bin/mypy -p benchmarks -p tests
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(VENV)/bin/codespell

# Builds the documentation site: open build/docs/index.html. A warning is an error, and nothing is downloaded.
docs: $(VENV)/docs
	rm -rf build/docs
	$(VENV)/bin/sphinx-build -q -W --keep-going -E -d build/doctrees docs build/docs

# Under sanitizers, compares the CPU kernels and the CUDA kernels (on an emulated device) with their definition, and
# calls every operator with wrong tensors. Takes minutes.
sanitize: $(VENV)/installed
	CXX="$(CXX)" csrc/cpu/sanitize.sh
	CXX="$(CXX)" csrc/cpu/sanitize_calls.sh $(VENV)/bin/python
	CXX="$(CXX)" csrc/cuda/sanitize.sh

# Cross-compiles the CPU kernels for aarch64, runs them in an emulator, and compares them with their definition. On one
# core this takes ten minutes, or two minutes with OPTIONS=--quick, which skips most large cases. OPTIONS can also name
# groups of checks in csrc/cpu/check.cpp: make arm OPTIONS="'two views' slabs". On Debian, first install the compiler
# and the emulator: apt-get install g++-aarch64-linux-gnu qemu-user.
arm:
	csrc/cpu/sanitize.sh arm $(if $(OPTIONS),-- $(OPTIONS))

# Reports registers, shared memory, spills and instructions of the Triton and CUDA kernels, compiled for every supported
# GPU. Needs no GPU.
kernels-report: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks kernels --check
	$(VENV)/bin/python -m benchmarks.binary --check

# Compiles the Triton kernels with other versions of Triton. Each version is downloaded to build/ (200 MB); the version
# in the environment stays.
TRITONS ?= 3.3.1 3.6.0
triton-versions: $(VENV)/installed
	for version in $(TRITONS); do \
	  $(VENV)/bin/pip install --quiet --no-deps --target build/triton-$$version triton==$$version || exit 1; \
	  PYTHONPATH=build/triton-$$version $(VENV)/bin/python -m benchmarks kernels --d 128 768 \
	    --targets sm_80 sm_90 sm_100 sm_120 gfx942 || exit 1; \
	done

# Runs the benchmarks. These commands write the figures of the docs: make bench BENCH_OUT=benchmarks/results, then
# python -m benchmarks report. The file of suite cpu is named after the instruction set, so that one folder can hold the
# files of several sets.
bench: $(VENV)/bench
	set=$$($(VENV)/bin/python -m benchmarks.instruction_set) && \
	  $(VENV)/bin/python -m benchmarks cpu --threads 1 2 --out $(BENCH_OUT)/cpu-$$set.json
	for suite in memory scaling family drop-ins converged distributed schedule; do \
	  $(VENV)/bin/python -m benchmarks $$suite --out $(BENCH_OUT)/$$suite.json || exit 1; \
	done

# Runs suite cpu as on a processor without AVX-512.
bench-avx2: $(VENV)/bench
	$(AVX2) $(VENV)/bin/python -m benchmarks cpu --instruction-set avx2 --out $(BENCH_OUT)/cpu-avx2.json

# Runs everything that needs a GPU, on a machine with one: build, verify, test, compute-sanitizer, benchmark, tune and
# ncu, in parts of at most ten minutes each. A second call continues where the first stopped. Afterwards,
# python -m benchmarks report adds the device to docs/verification.md.
#   one stage:      make gpu STAGE=verify
#   limited time:   make gpu OPTIONS="--seconds 540"
#   without a GPU:  make gpu OPTIONS=--rehearse
gpu: $(VENV)/bench
	$(VENV)/bin/python -m benchmarks.gpu_session $(if $(STAGE),--stage $(STAGE)) $(if $(OUT),--out $(OUT)) $(OPTIONS)

# Does what a new user does first: a regular install, SimCLR trained on real digits, a report. The command runs in
# another folder, because here the checkout would shadow the installed package and its kernels. The environment is
# reused until the package changes.
demo: $(DEMO_VENV)/installed
	@echo "Training SimCLR on 5,000 handwritten digits: half a minute to two minutes on two CPU cores"
	cd $(DEMO_VENV) && bin/python -m fastntxent.simclr --out $(abspath $(DEMO_OUT)) --overwrite --verify-every 20
	@echo "Open $(DEMO_OUT)/report.html in a browser"

$(DEMO_VENV)/installed: pyproject.toml setup.py $(shell find fastntxent csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	@echo "Creating an environment in $(DEMO_VENV), with PyTorch and fastntxent: a few minutes the first time"
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install --progress-bar on --disable-pip-version-check $(TORCH) ".[simclr]"
	touch $@

# Holds the value of TORCH, so that another value installs that PyTorch.
$(VENV)/torch: FORCE
	@mkdir -p $(VENV) && { echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@; }

$(VENV)/installed: pyproject.toml setup.py $(VENV)/torch
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[test,lint]"
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[bench]"
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist *.egg-info fastntxent/_*.so fastntxent/_*.pyd .mypy_cache .pytest_cache .ruff_cache \
	  .hypothesis
