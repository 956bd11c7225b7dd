"""Constants and functions shared by the models of the Triton kernels (model.py) and the CUDA kernel (model_cuda.py).

SYNC and LOAD are the latencies of shared memory (29 to 33 cycles on A100 and H100) and of the L2 cache (about
260 cycles; Luo et al., arXiv 2402.13499). We assume the same for the B200. FIRST is about two memory latencies of 470
to 480 cycles: one to load an address, and one to load from that address.
"""

from __future__ import annotations

from typing import NamedTuple

from .chips import Chip

GEMM = 0.7  # share of the data sheet's matrix rate
LAUNCH = 2.5e-6  # seconds from the end of one short kernel to the end of the next
SYNC, LOAD, FIRST = 30, 260, 1000  # cycles
FILL = 64  # most bytes per cycle that one multiprocessor reads from the L2 cache, even if it is the only one active


class Time(NamedTuple):
    """A time in seconds, and the name of the limit that determines it. For one step of the CUDA kernel (model_cuda.py),
    `seconds` is in cycles."""

    seconds: float
    limit: str


def longest(limits: dict[str, float]) -> Time:
    """Return the limit with the longest time: the bottleneck."""
    limit = max(limits, key=limits.__getitem__)
    return Time(limits[limit], limit)


def fill(chip: Chip, active: float) -> float:
    """Return the bytes per cycle that each of the active multiprocessors gets from the L2 cache."""
    rates = chip.known_rates
    return min(FILL, rates.cache / rates.cycles * chip.multiprocessors / active)
