"""python -m benchmarks cpu|memory: figures of this machine, as a table on the screen and as JSON.

cpu      forward, backward and both, against the dense loss eager and compiled, and against the machine's own
         limit: twice 2 M^2 D flops at the rate of a 2048^3 product measured in the same run
memory   peak memory beside the inputs, a process each
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import machine, memory, timing


def cpu(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Time every size, and print a table."""
    print("| N | D | loss | forward ms | backward ms | both ms (p20 - p80) | x floor | eager / this |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    results = []
    for n in arguments.n or [256, 1024, 4096]:
        result = timing.compare(n, arguments.d, arguments.repeats)
        results.append(result)
        for name, row in result["losses"].items():
            both = row["both"]
            print(
                f"| {n} | {arguments.d} | {name} | {row['forward']['p50']:.2f} | {row['backward']['p50']:.2f} "
                f"| {both['p50']:.2f} ({both['p20']:.2f} - {both['p80']:.2f}) "
                f"| {row['times_floor']:.2f} | {row['eager_over_this']:.2f} |"
            )
    return results


def peak_memory(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Peak memory of every size, and print a table."""
    print("| N | D | loss | extra MiB | seconds |")
    print("|---:|---:|---|---:|---:|")
    results = []
    for n in arguments.n or [1024, 4096, 32768]:
        for name in ("blocked", "eager"):
            if name == "eager" and n > arguments.largest_dense:
                continue
            result = memory.measure(name, n, arguments.d)
            results.append(result)
            print(f"| {n} | {arguments.d} | {name} | {result['extra_bytes'] / 2**20:.1f} | {result['s']:.2f} |")
    return results


SUITES = {"cpu": cpu, "memory": peak_memory}


def main() -> None:
    """Run one suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split(":")[0])
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--n", type=int, nargs="+", help="samples per batch (default: a range)")
    parser.add_argument("--d", type=int, default=128, help="features")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--largest-dense", type=int, default=8192, help="largest N of the dense loss in `memory`")
    parser.add_argument("--out", type=Path, help="write the results here, as JSON")
    arguments = parser.parse_args()
    results = SUITES[arguments.suite](arguments)
    if arguments.out:
        record = {
            "suite": arguments.suite,
            "machine": {**machine.provenance(), "copy_gb_per_s": machine.copy_bandwidth() / 1e9},
            "results": results,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
