"""What the host does for a loss and its gradient, beside autograd and the kernels: python -m benchmarks.host

The launch is an empty function, on a batch too small for anything else to take time, so what is left is Python and
PyTorch. It is held against a bare `torch.autograd.Function` with the same outputs and gradients. Seconds are those of
this thread alone.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fastntxent import NTXentLoss, nt_xent
from fastntxent.backends.cuda.calls import CudaBackend

from .timing import Phases, interleave

CALLS, ROUNDS = 300, 21


def main() -> None:
    """Print microseconds of a step: the least and the median."""
    torch.set_num_threads(1)
    with empty_launch():
        seconds = measure(steps(), CALLS, ROUNDS)
    for name, of_step in seconds.items():
        least, median = 1e6 * min(of_step), 1e6 * statistics.median(of_step)
        print(f"{name:24} {least:6.1f} us at least, {median:6.1f} us in the median")


@contextlib.contextmanager
def empty_launch() -> Iterator[None]:
    """A block in which backend "cuda" takes tensors of the CPU and leaves its outputs as they come."""
    kernels = ModuleType("_cuda")
    kernels.workspace = lambda *_: 1 << 16  # type: ignore[attr-defined]
    kernels.run = lambda *_: None  # type: ignore[attr-defined]
    package = importlib.import_module("fastntxent.backends")
    backend, load = CudaBackend(kernels, "cpu"), package._load
    with mock.patch.object(package, "_load", lambda name: backend if name == "cuda" else load(name)):
        yield


def steps() -> dict[str, Callable[[], None]]:
    """A step of the loss by each way to it."""
    z_i, z_j = (torch.randn(8, 4, requires_grad=True) for _ in range(2))
    module = NTXentLoss(0.1, backend="cuda")
    return {
        "autograd alone": lambda: _Bare.apply(z_i, z_j).backward(),
        "nt_xent": lambda: nt_xent(z_i, z_j, 0.1, backend="cuda").backward(),
        "NTXentLoss": lambda: module(z_i, z_j).backward(),
    }


def measure(steps: dict[str, Callable[[], None]], calls: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step, the steps in turn."""

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
