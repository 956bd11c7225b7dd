"""What the models of the Triton kernels (model.py) and of the CUDA kernel (model_cuda.py) share: constants, and a time
with the limit that binds.

SYNC and LOAD are the latencies of shared memory and of the second-level cache (Luo et al., arXiv 2402.13499: 29 to 33
and about 260 cycles on A100 and H100), taken for the B200 too; FIRST is twice that of memory (470 to 480), for an
address and what lies there.
"""

from __future__ import annotations

from typing import NamedTuple

from .chips import Chip

GEMM = 0.7  # of the data sheet's matrix rate
LAUNCH = 2.5e-6  # seconds between the ends of two short kernels
SYNC, LOAD, FIRST = 30, 260, 1000  # cycles
FILL = 64  # bytes a cycle that a multiprocessor takes from the second-level cache, however few share it


class Time(NamedTuple):
    """Seconds of a kernel, and the limit that they go to."""

    seconds: float
    limit: str


def longest(limits: dict[str, float]) -> Time:
    """The one that binds."""
    limit = max(limits, key=limits.__getitem__)
    return Time(limits[limit], limit)


def fill(chip: Chip, active: float) -> float:
    """Bytes a cycle from the second-level cache for each of the multiprocessors that are active."""
    rates = chip.rates
    assert rates is not None
    return min(FILL, rates.cache / rates.cycles * chip.multiprocessors / active)
