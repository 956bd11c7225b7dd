"""Host time of a loss and its gradient, compared with autograd alone: python -m benchmarks.host

Kernel launches are replaced by an empty function, and the batch is so small that arithmetic on it takes almost no time.
What remains is the overhead of PyTorch and of this package's Python code. Triton's kernels are compiled for sm_90 but
never run. "autograd alone" is a bare `torch.autograd.Function` whose output and gradients have the same shapes. Times
are the CPU time of this thread.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fastntxent import NTXentLoss, nt_xent
from fastntxent.backends.base import KernelBackend
from fastntxent.backends.cuda.calls import CudaBackend
from fastntxent.options import BackendName

from .timing import Phases, interleave

CALLS, ROUNDS = 300, 21


def main() -> None:
    """Print the minimum and the median time of a step in microseconds."""
    torch.set_num_threads(1)
    sizes: dict[BackendName, tuple[int, int]] = {"cuda": (8, 4), "triton": (256, 4)}
    for name, (n, d) in sizes.items():
        print(f"{name}, N = {n}, D = {d}")
        with empty_launch() if name == "cuda" else empty_triton():
            seconds = seconds_of_steps(steps(name, n, d), CALLS, ROUNDS)
        for step, of_step in seconds.items():
            least, median = 1e6 * min(of_step), 1e6 * statistics.median(of_step)
            print(f"  {step:32} {least:6.1f} us minimum, {median:6.1f} us median")


@contextlib.contextmanager
def empty_launch() -> Iterator[None]:
    """Replace backend "cuda" with one that accepts CPU tensors and leaves its outputs uninitialised."""
    kernels = ModuleType("_cuda")
    kernels.workspace = lambda *_: 1 << 16  # type: ignore[attr-defined]
    kernels.run = lambda *_: None  # type: ignore[attr-defined]
    with _in_place_of("cuda", CudaBackend(kernels, "cpu")):
        yield


@contextlib.contextmanager
def empty_triton() -> Iterator[_NoDevice]:
    """Replace backend "triton" with one that accepts CPU tensors, compiles for an H100 and runs no kernel."""
    from triton.runtime.driver import driver

    with mock.patch("torch.cuda.is_available", return_value=True):
        module = importlib.import_module("fastntxent.backends.triton.backend")
    assert not module.INTERPRETED, "TRITON_INTERPRET must not be set"
    config = importlib.import_module("fastntxent.backends.triton.config")
    backend = module.TritonBackend()
    backend.device_types = ("cpu",)
    device = _NoDevice()
    driver.set_active(device)  # not undone: a process without a GPU has no other driver
    with (
        mock.patch.object(config, "chip", return_value="sm_90"),
        mock.patch.object(config, "multiprocessors", return_value=132),
        _in_place_of("triton", backend),
    ):
        yield device


class _NoDevice:
    """A driver for Triton that acts as an H100: it accepts every launch and does nothing."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132},
            load_binary=lambda name, kernel, shared, device: (0, 0, 64, 0, 1024)[: _handles()],
            unload_module=lambda module: None,
        )
        self.launched: deque[tuple[Any, ...]] = deque(maxlen=100)  # grid and arguments of the latest launches
        self.launcher_cls = lambda source, metadata: self._launch

    def _launch(self, *told: Any) -> None:  # grid, stream, function, two sets of metadata, two hooks, arguments
        self.launched.append((*told[:3], *told[9:]))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _handles() -> int:
    """Return the length of Triton's tuple for a loaded kernel: since 3.4 it includes the maximum number of threads."""
    import triton

    return 4 if triton.__version__.startswith("3.3") else 5


@contextlib.contextmanager
def _in_place_of(name: str, backend: KernelBackend) -> Iterator[None]:
    package = importlib.import_module("fastntxent.backends")
    load = package._load
    with mock.patch.object(package, "_load", lambda asked: backend if asked == name else load(asked)):
        yield


def steps(backend: BackendName, n: int, d: int) -> dict[str, Callable[[], None]]:
    """Return a step of autograd alone, and one for each way to call the loss."""
    z_i, z_j = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    module = NTXentLoss(0.1, backend=backend)
    return {
        "autograd alone": lambda: _Bare.apply(z_i, z_j).backward(),
        "nt_xent": lambda: nt_xent(z_i, z_j, 0.1, backend=backend).backward(),
        "NTXentLoss": lambda: module(z_i, z_j).backward(),
    }


def seconds_of_steps(steps: dict[str, Callable[[], None]], calls: int, rounds: int) -> dict[str, list[float]]:
    """Return the times of each step in seconds; the steps take turns."""

    def turn(step: Callable[[], None], _: int) -> Phases:
        started = time.thread_time()
        for _ in range(calls):
            step()
        return {"step": (time.thread_time() - started) / calls}

    times = interleave({name: partial(turn, step) for name, step in steps.items()}, seconds=0, fewest=rounds)
    return {name: phases["step"] for name, phases in times.items()}


class _Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_i: torch.Tensor, z_j: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.empty_like(z_i), torch.empty_like(z_j))
        return z_i.new_empty(())

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(d_loss * gradient for gradient in ctx.saved_tensors)


if __name__ == "__main__":
    main()
