"""The conditions of a measurement: the machine, its versions, its clock and its measured limits."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

import fastntxent

from . import competitors, instruction_set

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
LARGEST_PRODUCT = 2**28  # bytes of a result that `similarities_call` holds at a time


def provenance() -> dict[str, object]:
    """Return the machine, the versions and the time of a measurement."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "instruction_set": instruction_set.in_use(),
        "held": instruction_set.held,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastntxent": fastntxent.__version__,
        "packages": competitors.versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Clock(Protocol):
    """A clock. The type of a mark depends on the clock."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """Wall time on the host."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Time on the current stream, from events."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


CLOCKS: dict[str, Clock] = {"cpu": HostClock(), "cuda": CudaClock()}


def gemm_call(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Callable[[], float], float]:
    """Return (call, flops). call() multiplies two square matrices in `flops` flops and returns the seconds."""
    size, clock = GEMM_SIZE[device], CLOCKS[device]
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)

    def call() -> float:
        start = clock.mark()
        torch.mm(a, b)
        return clock.seconds(start, clock.mark())

    return call, 2 * size**3


def similarities_call(n: int, d: int) -> Callable[[], float]:
    """Return a function that multiplies 2n rows with themselves, a block of rows at a time, and returns its seconds."""
    z = torch.randn(2 * n, d)
    rows = min(len(z), max(LARGEST_PRODUCT // (len(z) * z.itemsize), 1))
    out = torch.empty(rows, len(z))

    def call() -> float:
        start = time.perf_counter()
        for part in z.split(rows):
            torch.mm(part, z.T, out=out[: len(part)])
        return time.perf_counter() - start

    return call


def gemm_rate(repeats: int = 3) -> float:
    """Return the flops per second of a 2048^3 product."""
    call, flops = gemm_call()
    call()
    return flops / statistics.median(call() for _ in range(repeats))


def floor(n: int, d: int, rate: float) -> float:
    """Return the seconds that 2u flops take at `rate` flops per second, with u = 2 M^2 D and M = 2N."""
    return 2 * (2 * (2 * n) ** 2 * d) / rate


def copy_bandwidth(repeats: int = 7) -> float:
    """Return the bytes per second of a 256 MiB copy, counting reads and writes."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)
