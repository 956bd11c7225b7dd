"""Suite `scaling`: does time grow with N^2, and memory with N?"""

from __future__ import annotations

import argparse
import statistics

from . import machine, memory

GRID = (8192, 16384, 32768, 65536)


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """One process a size; seconds also as multiples of the floor at the GEMM's rate before and after."""
    name = (arguments.only or ["cpu"])[0]
    results = []
    for d in arguments.d or [128]:
        rows = []
        for n in arguments.n or GRID:
            row = memory.measure_in_process(name, n, d, arguments.seconds)
            rate = 1e9 * statistics.mean(row["gemm_gflops"])
            row["times_floor"] = row["s"] / machine.floor(n, d, rate)
            rows.append(row)
            first = rows[0]
            # Seconds / N^2 against the first size's: 1 where time grows with N^2. The floor has N^2 in it.
            row["growth"] = row["s"] / first["s"] * (first["n"] / n) ** 2
            row["growth_normalised"] = row["times_floor"] / first["times_floor"]
            print(f"N {n}, D {d}: {row['s']:.2f} s, {row['growth_normalised']:.2f} x N^2", flush=True)
        results += rows
    return results, {}
