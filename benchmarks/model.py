"""Suite `model`: what NT-Xent's kernels should take on GPUs that need not be here, from flops, exponentials and bytes.

A kernel's programs go in rounds over the multiprocessors; in all of them it needs

    products     flops of the matrix units: float32 is three products of half-precision parts
    exps         one exponential for each pair of rows that it forms
    shared       bytes that the matrix units read of shared memory: the second operand once for 64 rows, the first once
                 for a tile, unless it comes from registers
    cache        bytes of x (and of G) that its tiles read, through the second-level cache
    memory       bytes that come from or go to memory: what does not fit in that cache is read again

and takes the longest of the five; where one program fills a multiprocessor, products and exponentials take turns. The
matrix units are given GEMM of the data sheet's rate, about what large products of cuBLAS reach under a board's power
limit; a measured rate takes its place where there is one. A launch costs LAUNCH. What is left out: latency inside a
program, which small batches feel, and the host.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

from . import kernels
from .chips import CHIPS, Chip

SHAPES = ((256, 128), (4096, 128), (32768, 128), (32768, 768))
TARGETS = ("sm_80", "sm_90", "sm_100")
GEMM = 0.7  # of the data sheet's matrix rate
LAUNCH = 2.5e-6  # seconds between the ends of two short kernels
CACHED = 24 * 2**20  # bytes that stay in the second-level cache from one program to the next


class Work(NamedTuple):
    """What all programs of a kernel need; of a panel's kernels, all panels."""

    products: float
    exps: float
    shared: float
    cache: float
    memory: float
    programs: float
    launches: int = 1


def seconds(work: Work, chip: Chip, resident: int | None, dtype: str, gemm: float | None = None) -> float:
    """How long a kernel takes."""
    rates = chip.rates
    assert rates is not None
    matrix = gemm or GEMM * (rates.tf32 if dtype == "tf32" else rates.product)
    rounds = work.programs / work.launches / chip.multiprocessors
    uneven = math.ceil(rounds) / rounds
    products, exps = max(work.products / matrix, work.shared / rates.shared), work.exps / rates.exp
    both = max(products, exps) if (resident or 1) > 1 else products + exps
    return max(both * uneven, work.cache / rates.cache, work.memory / rates.memory) + LAUNCH * work.launches


def work_of(kernel: str, tiles: dict[str, tuple[int, ...]], M: int, DP: int, dtype: str, chip: Chip) -> Work:
    """NT-Xent's M rows of DP features."""
    from fastntxent.backends.triton import backward, config, pack

    block_m, block_n, block_d, *_ = tiles[kernel]
    parts, width = (3 if dtype == "fp32" else 1), (2 if dtype == "bf16" else 4)
    pairs, x_bytes = M * M, M * DP * width
    product, row = 2 * pairs * DP * parts, DP * width
    shared = product * (1 / 64 + 1 / (block_d if kernel == "gather" else block_n))
    again = x_bytes if x_bytes > CACHED else 0  # of a pass over x that follows another
    if kernel == "direct":
        edge = config.edge_of_square(M, M, max(block_m, block_n))
        squares = math.ceil(M / edge) * (math.ceil(M / edge) + 1) / 2
        formed = squares * (edge / block_m) * (edge / block_n)
        of_tile = block_n * row + (0 if block_d == DP else block_m * row)
        memory = x_bytes + (2 * squares * edge * row if again else 0) + 4 * M * M / edge
        return Work(product / 2, pairs / 2, shared / 2, formed * of_tile, memory, squares)
    if kernel == "owned":
        formed = pairs / (block_m * block_n)
        return Work(product, pairs, shared, formed * (block_m + block_n) * row, x_bytes, math.ceil(M / block_m))
    if kernel == "fused":
        blocks = math.ceil(M / block_m)
        part_cols = config.columns_of_part(chip.multiprocessors, blocks, M, block_n)
        parts_of_cols = math.ceil(M / part_cols)
        cache = pairs / (block_m * block_n) * block_n * row
        memory = x_bytes + again * blocks / (config.PROGRAMS * chip.multiprocessors) + 8 * parts_of_cols * M * DP
        return Work(2 * product, pairs, shared + product / 64, cache, memory, blocks * parts_of_cols)
    padded = math.ceil(M / pack.PADDED_ROWS) * pack.PADDED_ROWS
    highest = max(backward.WORKSPACE // (padded * width) // pack.PADDED_ROWS, 1) * pack.PADDED_ROWS
    height = config.height_of_panel(chip.multiprocessors, min(highest, padded), DP, tiles["gather"])
    panels = math.ceil(M / height)
    memory = x_bytes + again * panels + pairs * width
    if kernel == "form":
        formed = pairs / (block_m * block_n)
        return Work(product, pairs, shared, formed * (block_m + block_n) * row, memory, formed, panels)
    programs = math.ceil(M / block_m) * (DP / block_d)
    return Work(product, 0, shared, programs * M * (block_m + block_d) * width, memory + 4 * M * DP, programs, panels)


def around(M: int, DP: int, dtype: str, chip: Chip, finished: bool) -> float:
    """Seconds of packing, of the ends of rows and of the way back: memory and launches."""
    rates, width = chip.rates, 2 if dtype == "bf16" else 4
    read = M * DP * (2 * 2 * width + width)  # twice, with the positive; written once
    back = M * DP * (4 + 2 * width + 4)
    return (read + back) / rates.memory + LAUNCH * (3 if finished else 2)


def predict(target: str, n: int, d: int, dtype: str, gemm: float | None = None) -> dict[str, float]:
    """Milliseconds of every kernel of a forward and backward, of the forward, and of all of it."""
    from fastntxent.backends.triton import config, pack

    chip, M, DP = CHIPS[target], 2 * n, pack.padded_features(d)
    width = 2 if dtype == "bf16" else 4

    tiles = {kernel: config.look_up(chip.family, kernel, width, M, DP) for kernel in config.KERNELS}
    forward = "direct" if tiles["direct"] else "owned"
    backward = ["fused"] if tiles["fused"] else ["form", "gather"]
    times = {}
    for kernel in (forward, *backward):
        shifted = False if kernel in ("fused", "form") else None
        resident = kernels.compile_one(target, kernel, dtype, d, "usual", tiles[kernel], shifted).resident
        times[kernel] = seconds(work_of(kernel, tiles, M, DP, dtype, chip), chip, resident, dtype, gemm)
    times["around"] = around(M, DP, dtype, chip, forward == "direct")
    times["forward"] = times[forward] + times["around"] / 2
    times["both"] = sum(times[kernel] for kernel in (forward, *backward, "around"))
    u = 2 * M * M * d / (gemm or GEMM * chip.rates.product)
    return {**{name: 1e3 * s for name, s in times.items()}, "u": 1e3 * u}


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Predictions for every chip whose data sheet is known."""
    shapes = [(n, d) for d in arguments.d or [128] for n in arguments.n or [256, 4096, 32768]]
    results = []
    for target in TARGETS:
        for n, d in shapes if arguments.n or arguments.d else SHAPES:
            for dtype in ("bf16", "fp32"):
                times = predict(target, n, d, dtype)
                results.append({"target": target, "n": n, "d": d, "dtype": dtype, "ms": times})
                print(line(results[-1]), flush=True)
    return results, {}


def line(result: dict) -> str:
    """A prediction for the screen."""
    times: dict[str, float] = result["ms"]
    size = f"{result['target']:6} N {result['n']}, D {result['d']}, {result['dtype']}"
    digits: Callable[[float], str] = "{:.3g}".format
    return f"{size}: " + ", ".join(f"{name} {digits(ms)}" for name, ms in times.items())
