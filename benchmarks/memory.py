"""Suite `memory`: peak memory beyond the inputs, with one process per measurement."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from . import instruction_set, machine
from .competitors import load, names
from .timing import TEMPERATURE, Case, step

if TYPE_CHECKING:
    from typing_extensions import NotRequired

GRID = (64, 1024, 4096, 16384, 65536)

# Freed blocks of 64 KiB and more are returned to the system, so resident memory is memory in use.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


class MemoryRow(TypedDict):
    """The figures of one process."""

    loss: str
    n: int
    d: int
    temperature: float
    extra_bytes: int
    s: float
    steps: int
    gemm_gflops: list[float]  # rates of a matrix product before and after the steps
    times_floor: NotRequired[float]  # this figure and the next two are set by the suite `scaling`
    growth: NotRequired[float]
    growth_normalised: NotRequired[float]


def measure_in_process(name: str, n: int, d: int, seconds: float = 0) -> MemoryRow:
    """Measure a loss in a new process. Return the peak memory of its steps, their median time over `seconds`, and
    the rates of a matrix product before and after the steps."""
    command = [sys.executable, *instruction_set.module("benchmarks.memory"), name, str(n), str(d), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def run(arguments: argparse.Namespace) -> tuple[list[MemoryRow], dict[str, str]]:
    """Return results for every size and loss that fits, and the losses that are missing."""
    results, missing = [], {}
    for n, d in ((n, d) for d in arguments.d or [128] for n in arguments.n or GRID):
        made, absent = load(names("cpu", n, arguments.only), TEMPERATURE)
        missing.update(absent)
        for name in made:
            results.append(measure_in_process(name, n, d))
            print(f"N {n}, D {d}, {name}: {results[-1]['extra_bytes'] / 2**20:.1f} MiB", flush=True)
    return results, missing


def resident_peak() -> int:
    """Return the process's largest resident size since `forget_peak`, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Reset the peak that `resident_peak` returns."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise RuntimeError("peak memory can be measured only with Linux's /proc/self/status and clear_refs") from error


def _main(name: str, n: int, d: int, seconds: float) -> None:
    losses, missing = load([name], TEMPERATURE)
    if missing:
        raise SystemExit(f"{name}: {missing[name]}")
    z_i, z_j = Case(n, d).inputs()
    # This step loads libraries and starts threads. It is small: after a large step, memory that a kernel holds between
    # calls would be missing from the measurement below. For "compiled" the step has full size, so that the memory of
    # its compiler is not measured.
    step(losses[name], *Case(n if name == "compiled" else min(n, 32), d).inputs())
    rates = [machine.gemm_rate()]
    forget_peak()
    before = resident_peak()
    times: list[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        times.append(step(losses[name], z_i, z_j)["both"])
    extra = resident_peak() - before
    rates.append(machine.gemm_rate())
    result: MemoryRow = {
        "loss": name,
        "n": n,
        "d": d,
        "temperature": TEMPERATURE,
        "extra_bytes": extra,
        "s": statistics.median(times),
        "steps": len(times),
        "gemm_gflops": [rate / 1e9 for rate in rates],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
