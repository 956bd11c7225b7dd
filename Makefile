# make test | lint | demo | bench | clean
#
# Each target makes the virtual environment it needs. Another PyTorch: make test TORCH=torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
DEMO_VENV ?= .venv-demo
DEMO_OUT ?= runs/demo

.PHONY: test lint demo bench clean

test: $(VENV)/installed
	$(VENV)/bin/pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks cpu --out runs/bench-cpu.json
	$(VENV)/bin/python -m benchmarks memory --out runs/bench-memory.json

# A person's first minutes: a fresh environment, an ordinary install, SimCLR trained on real digits, a report.
demo:
	rm -rf $(DEMO_VENV)
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) ".[simclr]"
	$(DEMO_VENV)/bin/python -m fastntxent.simclr --out $(DEMO_OUT) --overwrite --verify-every 20

$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check $(TORCH) -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
