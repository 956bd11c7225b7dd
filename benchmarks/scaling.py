"""Suite `scaling`: does time grow with N^2 and memory with N, and how much do more threads gain?"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence

from . import instruction_set, machine, memory, schedule, timing
from .competitors import load

GRID = (8192, 16384, 32768, 65536)
THREADS_GRID = (256, 1024, 4096)


def run(arguments: argparse.Namespace) -> tuple[Sequence[Mapping[str, object]], dict[str, str]]:
    """Return results for several numbers of threads if these are given, otherwise for several sizes."""
    name = (arguments.only or ["cpu"])[0]
    return _over_threads(name, arguments) if arguments.threads else (_over_sizes(name, arguments), {})


def _over_sizes(name: str, arguments: argparse.Namespace) -> list[memory.MemoryRow]:
    """Measure each size in a separate process, and return the results. `times_floor` is the ratio of the seconds to
    `machine.floor`, a comparison time at the GEMM's rate."""
    results = []
    for d in arguments.d or [128]:
        rows = []
        for n in arguments.n or GRID:
            row = memory.measure_in_process(name, n, d, arguments.seconds)
            rate = 1e9 * statistics.mean(row["gemm_gflops"])
            row["times_floor"] = row["s"] / machine.floor(n, d, rate)
            rows.append(row)
            first = rows[0]
            # seconds / N^2 relative to the first size: 1 if time grows with N^2. The floor already contains N^2.
            row["growth"] = row["s"] / first["s"] * (first["n"] / n) ** 2
            row["growth_normalised"] = row["times_floor"] / first["times_floor"]
            print(f"N {n}, D {d}: {row['s']:.2f} s, {row['growth_normalised']:.2f} x N^2", flush=True)
        results += rows
    return results


def _over_threads(name: str, arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return times of our kernel, and of torch.mm of the same rows with themselves, at each number of threads."""
    made, missing = load([name], timing.TEMPERATURE)
    results = []
    for n, d in ((n, d) for d in arguments.d or [128] for n in (arguments.n or THREADS_GRID) if made):
        case = timing.Case(n, d)
        timing.check(name, made[name], case)
        product = machine.similarities_call(n, d)
        counts = timing.compare_threads(made[name], arguments.threads, case, arguments.seconds, product)
        for count, row in counts.items():
            relative = int(count) / arguments.threads[0]
            row["efficiency"] = row["speed_up"] / relative
            row["gemm_efficiency"] = row["gemm_speed_up"] / relative
            row["predicted_speed_up"] = _predicted(name, n, d, arguments.threads[0], int(count))
            print(f"N {n}, D {d}, threads {count}: {row['both']['p50']:.3f} ms, x {row['speed_up']:.2f}", flush=True)
        results.append({"n": n, "d": d, "ours": name, "threads": counts})
    return results, missing


def _predicted(name: str, n: int, d: int, first: int, count: int) -> float | None:
    """Return the simulated speed-up relative to the first number of threads. Return None for a loss that does not use
    the C++ kernels, because only these have a schedule."""
    if name != "cpu" or instruction_set.in_use() is None:
        return None
    problem = schedule.two_views(n, d)
    return schedule.simulate(problem, first).ms / schedule.simulate(problem, count).ms
