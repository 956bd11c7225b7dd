"""Suite `cpu`: a step of every loss at every size, and our kernel at several numbers of threads."""

from __future__ import annotations

import argparse

from . import machine
from .competitors import OURS, load, names
from .timing import TEMPERATURE, Case, Comparison, compare, compare_threads, lines

GRID = ((16, 128), (64, 128), (256, 128), (1024, 128), (4096, 128), (2048, 512), (2048, 2048))


def sizes(arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the grid, or every N with every D given on the command line."""
    if not arguments.n and not arguments.d:
        return list(GRID)
    return [(n, d) for d in arguments.d or [128] for n in arguments.n or [16, 64, 256, 1024, 4096]]


def run(arguments: argparse.Namespace) -> tuple[list[Comparison], dict[str, str]]:
    """Return the results, and the losses that are missing."""
    results, missing = [], {}
    for n, d in sizes(arguments):
        losses, absent = load(names("cpu", n, arguments.only), TEMPERATURE)
        missing.update(absent)
        result = compare(losses, Case(n, d), arguments.seconds)
        kernel = next((losses[name] for name in OURS if name in losses), None)
        if arguments.threads and kernel:
            gemm, _ = machine.gemm_call()
            result["threads"] = compare_threads(kernel, arguments.threads, Case(n, d), arguments.seconds, gemm)
        results.append(result)
        print(*lines(result), sep="\n", flush=True)
    return results, missing
