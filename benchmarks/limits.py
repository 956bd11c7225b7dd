"""Constants and functions shared by the models of the Triton kernels (model.py) and the CUDA kernel (model_cuda.py).

SYNC and LOAD are the latencies of shared memory and of the second-level cache: 29 to 33 and about 260 cycles on A100
and H100 (Luo et al., arXiv 2402.13499). We assume them for the B200 too. FIRST is twice the latency of memory (470 to
480 cycles), for a load of an address and a load from there.
"""

from __future__ import annotations

from typing import NamedTuple

from .chips import Chip

GEMM = 0.7  # share of the data sheet's matrix rate
LAUNCH = 2.5e-6  # seconds between the ends of two short kernels
SYNC, LOAD, FIRST = 30, 260, 1000  # cycles
FILL = 64  # most bytes per cycle that a multiprocessor reads from the second-level cache, even if few share it


class Time(NamedTuple):
    """A kernel's time in seconds, and the limit that determines it."""

    seconds: float
    limit: str


def longest(limits: dict[str, float]) -> Time:
    """Return the longest time, which is the bottleneck."""
    limit = max(limits, key=limits.__getitem__)
    return Time(limits[limit], limit)


def fill(chip: Chip, active: float) -> float:
    """Return the bytes per cycle that each of the active multiprocessors gets from the second-level cache."""
    rates = chip.rates
    assert rates is not None
    return min(FILL, rates.cache / rates.cycles * chip.multiprocessors / active)
