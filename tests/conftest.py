"""Without a GPU, Triton's kernels run in its interpreter: which they do is settled when triton is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run beside each other: one thread for each, before torch counts cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from benchmarks import instruction_set
from tests import tensor_cores

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def same_draws_every_time():
    torch.manual_seed(0)


def pytest_addoption(parser):
    text = "hold the CPU kernels to it, in the processes that tests start too (best: the fastest that this machine has)"
    parser.addoption("--instruction-set", choices=("best", *instruction_set.NAMES), default="best", help=text)
    text = "whose tensor cores Triton's interpreter and the emulated CUDA device round as, where a test does not say"
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


def pytest_report_header():
    return f"CPU kernels held to {instruction_set.held}" if instruction_set.held else None
