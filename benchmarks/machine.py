"""What a figure depends on: the machine, its versions, and its measured limits."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastntxent


def provenance() -> dict[str, object]:
    """Where and with what a result was measured."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fastntxent": fastntxent.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def gemm_call() -> tuple[Callable[[], object], float]:
    """A 2048^3 product, and its flops."""
    a, b = torch.randn(2, 2048, 2048)
    return lambda: torch.mm(a, b), 2 * 2048**3


def copy_bandwidth(repeats: int = 7) -> float:
    """Bytes per second of a 256 MiB copy, read and write counted."""
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds)
