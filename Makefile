# make test | test-all | test-instruction-sets | lint | sanitize | arm | kernels-report | triton-versions | demo | bench |
#   bench-avx2 | gpu | clean
#
# Each target makes the virtual environment it needs. Another PyTorch: make test TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO_VENV ?= .venv-demo
DEMO_OUT ?= runs/demo
BENCH_OUT ?= runs/bench

.PHONY: test test-all test-instruction-sets lint sanitize arm kernels-report triton-versions demo bench bench-avx2 gpu clean

# Tests run beside each other, with one thread each. `make test` leaves out those marked slow, which repeat in minutes what
# others show in seconds; `make test-all` runs every test.
WORKERS ?= logical
PYTEST := $(VENV)/bin/pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal --no-header

test: $(VENV)/installed
	$(PYTEST) -m "not slow"

test-all: $(VENV)/installed
	$(PYTEST)

# As on a processor with AVX2 and no AVX-512, whatever this one has: the libraries held to AVX2, our kernels to AVX2, then
# to portable C++. The tests left out do not reach those kernels. Inductor's cache is one of its own: code that it compiled
# for AVX-512 gives wrong numbers where PyTorch is held to AVX2.
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
	$(VENV)/bin/mypy -p benchmarks
	$(VENV)/bin/basedpyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/clang-format --dry-run -Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
	$(VENV)/bin/codespell

# The CPU kernels, and the CUDA kernels on an emulated device, against their definition under sanitizers, and every
# operator called with wrong tensors: minutes.
sanitize: $(VENV)/installed
	CXX="$(CXX)" csrc/cpu/sanitize.sh
	CXX="$(CXX)" csrc/cpu/sanitize_calls.sh $(VENV)/bin/python
	CXX="$(CXX)" csrc/cuda/sanitize.sh

# The CPU kernels of aarch64 against their definition, cross-compiled and run by an emulator: ten minutes of a core, or
# two with OPTIONS=--quick, which leaves out most large cases. OPTIONS can also name groups of csrc/cpu/check.cpp:
# make arm OPTIONS="'two views' slabs". Debian has the tools: apt-get install g++-aarch64-linux-gnu qemu-user.
arm:
	csrc/cpu/sanitize.sh arm $(if $(OPTIONS),-- $(OPTIONS))

# Registers, shared memory, spills and instructions of the Triton and CUDA kernels on every chip, none of which has to be
# here.
kernels-report: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks kernels --check
	$(VENV)/bin/python -m benchmarks.binary --check

# The Triton kernels compiled by other Tritons, each downloaded beside the environment's own (200 MB).
TRITONS ?= 3.3.1 3.6.0
triton-versions: $(VENV)/installed
	for version in $(TRITONS); do \
	  $(VENV)/bin/pip install --quiet --no-deps --target build/triton-$$version triton==$$version || exit 1; \
	  PYTHONPATH=build/triton-$$version $(VENV)/bin/python -m benchmarks kernels --d 128 768 \
	    --targets sm_80 sm_90 sm_100 sm_120 gfx942 || exit 1; \
	done

# The figures of the README and the docs: make bench BENCH_OUT=benchmarks/results, then python -m benchmarks report. Those of
# suite cpu are named after the instruction set, so that one folder holds several.
bench: $(VENV)/bench
	set=$$($(VENV)/bin/python -m benchmarks.instruction_set) && \
	  $(VENV)/bin/python -m benchmarks cpu --out $(BENCH_OUT)/cpu-$$set.json
	for suite in memory scaling family drop-ins converged distributed schedule; do \
	  $(VENV)/bin/python -m benchmarks $$suite --out $(BENCH_OUT)/$$suite.json || exit 1; \
	done

# Suite cpu as on a processor without AVX-512.
bench-avx2: $(VENV)/bench
	$(AVX2) $(VENV)/bin/python -m benchmarks cpu --instruction-set avx2 --out $(BENCH_OUT)/cpu-avx2.json

# On a machine with a GPU: build, verify, the suite, compute-sanitizer, the benchmark, the tuner, ncu, each in parts of ten
# minutes at most. It goes on where it stopped: make gpu STAGE=verify, make gpu OPTIONS="--seconds 540",
# make gpu OPTIONS=--rehearse where there is no GPU. Then python -m benchmarks report puts the device into the README.
gpu: $(VENV)/bench
	$(VENV)/bin/python -m benchmarks.gpu_session $(if $(STAGE),--stage $(STAGE)) $(if $(OUT),--out $(OUT)) $(OPTIONS)

# A person's first minutes: an ordinary install, SimCLR trained on real digits, a report. Not run from here, where the
# checkout would shadow the installed package and its kernels. The environment is kept, and made anew when the package
# changes.
demo: $(DEMO_VENV)/installed
	@echo "Training SimCLR on 5,000 handwritten digits: half a minute to two minutes on two CPU cores"
	cd $(DEMO_VENV) && bin/python -m fastntxent.simclr --out $(abspath $(DEMO_OUT)) --overwrite --verify-every 20
	@echo "Open $(DEMO_OUT)/report.html in a browser"

$(DEMO_VENV)/installed: pyproject.toml setup.py $(shell find fastntxent csrc -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	@echo "Making an environment in $(DEMO_VENV) and installing PyTorch and fastntxent: a few minutes the first time"
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install --progress-bar on --disable-pip-version-check $(TORCH) ".[simclr]"
	touch $@

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[test,lint]"
	touch $@

$(VENV)/bench: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
