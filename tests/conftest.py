"""Without a GPU, Triton's kernels run in Triton's interpreter. Triton reads TRITON_INTERPRET when it is imported, so
the variable is set here, before the tests import Triton."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers run side by side: one thread each, set before torch counts cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from benchmarks import instruction_set
from tests import interpreter, tensor_cores

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    interpreter.hasten()


@pytest.fixture(autouse=True)
def same_draws_every_time():
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():  # not torch.manual_seed, which queues a stack trace for each absent device type
        torch.cuda.manual_seed_all(0)


def pytest_addoption(parser):
    text = "use this instruction set in the CPU kernels and in processes that tests start (best: the machine's fastest)"
    parser.addoption("--instruction-set", choices=("best", *instruction_set.NAMES), default="best", help=text)
    text = "chip whose rounding Triton's interpreter and the emulated CUDA device copy, unless a test chooses one"
    parser.addoption("--tensor-cores", choices=tuple(tensor_cores.CHIPS), default=tensor_cores.chosen, help=text)


def pytest_configure(config):
    tensor_cores.chosen = config.getoption("--tensor-cores")
    name = config.getoption("--instruction-set")
    if name == "best":
        return
    try:
        instruction_set.hold(name)
    except (ImportError, ValueError) as error:
        raise pytest.UsageError(f"--instruction-set {name}: {error}") from error


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # no worker starts a slow test last


def pytest_report_header():
    return f"CPU kernels held to {instruction_set.held}" if instruction_set.held else None
