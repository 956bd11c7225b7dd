"""python -m benchmarks SUITE: measure this machine, print a table and, with --out, write JSON.

cpu        time of forward, backward and both for every loss, and the machine's limit: the time of 4 M^2 D flops (two
           products of all M = 2N rows with themselves) at the rate of a 2048^3 product measured in the same run.
           --threads 1 2 adds our kernel's speed-up. The report reads every cpu*.json, one per instruction set
memory     peak memory beyond the inputs, one process per measurement (Linux)
scaling    our `cpu` kernel at large N: seconds divided by N^2, and peak memory (Linux). --threads 1 2 4 ...: our
           kernel and torch.mm at these numbers of threads, compared with the prediction of suite schedule
schedule   speed-up of our `cpu` kernel on 1 to 64 threads, predicted by simulating its schedule; nothing is timed
converged  gradient errors against float64 as training converges (batches from tests/cases.py: needs pytest)
distributed
           a step on 1 to 4 gloo ranks on this machine: bytes and time, compared with the model of docs/distributed.md
           and with an all-gather with autograd (needs the test files)
family     CLIP in float32 and NT-Xent of bfloat16 rows, each compared with its dense formula; SupCon compared with
           NT-Xent: time, and peak memory (Linux)
drop-ins   small batches: the losses of fastntxent.compat compared with the formulas of the libraries they replace
gpu        like cpu, on a CUDA device, with the model's prediction beside our times
kernels    the Triton kernels compiled for GPUs that need not be present: registers, shared memory, spills, and the
           instructions of an iteration of the innermost loop. --check fails if any kernel has a fault, such as a spill
model      predicted milliseconds of the Triton and CUDA kernels on GPUs that need not be present, from their machine
           code and data sheets, each with its bottleneck. The unit u is one product of all rows with themselves
tune       the Triton kernels' table of tiles, from times on this GPU. --predict CHIP: from the model, without a GPU
report     the tables and the plot of the docs, from the results in benchmarks/results. --check only compares the
           tables
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import (
    chips,
    converged,
    cpu,
    distributed,
    drop_ins,
    family,
    gpu,
    instruction_set,
    kernels,
    machine,
    memory,
    model,
    report,
    scaling,
    schedule,
    tables,
    tune,
)
from .competitors import COMPETITORS

SUITES = {
    "cpu": cpu,
    "memory": memory,
    "scaling": scaling,
    "schedule": schedule,
    "converged": converged,
    "distributed": distributed,
    "family": family,
    "drop-ins": drop_ins,
    "gpu": gpu,
    "kernels": kernels,
    "model": model,
    "tune": tune,
}
CPU_SUITES = ("cpu", "memory", "scaling", "converged", "distributed", "family", "drop-ins")
THREADS = {
    "cpu": "also time our kernel at these numbers of threads",
    "scaling": "time our kernel and torch.mm at these numbers of threads, instead of large N",
    "schedule": "default: 1 2 4 8 16 32 64",
}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
    return value


def _tile(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def main(argv: list[str] | None = None) -> None:
    """Run one suite, or update the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name in SUITES:
        suite = commands.add_parser(name)
        if name not in ("kernels", "tune"):
            suite.add_argument("--n", type=_positive, nargs="+", help="samples per batch (default: a range)")
        if name != "tune":
            suite.add_argument("--d", type=_positive, nargs="+", help="features (default: 128, or a range)")
        suite.add_argument("--out", type=Path, help="write the results to this JSON file")
        if name == "kernels":
            suite.add_argument("--targets", nargs="+", choices=chips.CHIPS, help="chips (default: all)")
            suite.add_argument("--check", action="store_true", help="fail if any kernel has faults")
            suite.add_argument(
                "--quick", action="store_true", help="compile half of the cases, without figures of loops"
            )
        if name == "tune":
            suite.add_argument("--predict", choices=model.TARGETS, metavar="CHIP", help="use the model, not a device")
            suite.add_argument("--kernels", nargs="+", choices=tune.ROW_CLASSES, metavar="KERNEL", help="only these")
            suite.add_argument("--most", type=_positive, default=12, help="tiles to time per class (default: 12)")
            suite.add_argument(
                "--d", type=int, nargs="+", choices=tune.FEATURE_CLASSES.values(), help="only these classes of features"
            )
            suite.add_argument(
                "--tiles", type=_tile, nargs="+", metavar="M,N,D,WARPS,STAGES[,REGISTERS]", help="only these candidates"
            )
            suite.add_argument(
                "--workers",
                type=_positive,
                default=machine.processors(),
                help="processes that compile (default: %(default)s)",
            )
            suite.add_argument("--write", action="store_true", help="update the package's table")
        elif name not in ("converged", "distributed", "drop-ins", "family", "kernels", "model", "schedule"):
            suite.add_argument("--only", nargs="+", choices=COMPETITORS, metavar="LOSS", help="only these losses")
        if name in ("cpu", "drop-ins", "family", "gpu", "scaling", "tune"):
            suite.add_argument(
                "--seconds",
                type=float,
                default=20,
                help="seconds per comparison, but at least 5 rounds (suite scaling: 1 step)",
            )
        if name in CPU_SUITES:
            suite.add_argument(
                "--instruction-set", choices=instruction_set.NAMES, help="set for our kernel (default: the fastest)"
            )
        if name == "distributed":
            suite.add_argument("--ranks", type=_positive, nargs="+", default=[1, 2, 3, 4], help="default: 1 2 3 4")
            suite.add_argument("--rounds", type=_positive, default=21, help="rounds per comparison (default: 21)")
        if name in THREADS:
            suite.add_argument("--threads", type=_positive, nargs="+", help=THREADS[name])
    report.add_command(commands)
    arguments = parser.parse_args(argv)
    if arguments.suite == "report":
        report.run(arguments)
        return
    if arguments.suite == "scaling" and max(arguments.threads or [1]) > machine.processors():
        parser.error(f"--threads {max(arguments.threads)}: this process may use {machine.processors()} processors")
    if arguments.suite == "schedule" and instruction_set.in_use() is None:
        parser.error("schedule needs the CPU kernels, which were not built")
    if arguments.suite in CPU_SUITES:
        try:
            instruction_set.hold(arguments.instruction_set)
        except (ImportError, ValueError) as error:
            parser.error(f"--instruction-set {arguments.instruction_set}: {error}")
    _run_suite(arguments)


def _run_suite(arguments: argparse.Namespace) -> None:
    results, missing = SUITES[arguments.suite].run(arguments)
    record = {
        "suite": arguments.suite,
        "machine": {**machine.provenance(), "copy_gb_per_s": machine.copy_bandwidth() / 1e9},
        "missing": missing,
        "results": results,
    }
    print("", tables.TABLES[arguments.suite](record), sep="\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
