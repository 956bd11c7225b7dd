"""Suite `model`: predicts the times of NT-Xent's kernels from machine code and data sheets, without the GPUs.

The predicted time of a kernel is LAUNCH for each of its launches, plus the longest of these times:

    products     flops of the matrix units, at the data sheet's rate multiplied by GEMM. Large cuBLAS products reach
                 about that rate under a board's power limit. If there is a measured rate, it is used instead. A
                 float32 product takes three products of half-precision parts
    slots        instructions, at 4 per cycle per multiprocessor (sass.py)
    integers, floats, exps
                 instructions of one kind, at the rate of the units that execute them (chips.py)
    shared       bytes of shared memory, including the matrix units' operands, at 128 per cycle per
                 multiprocessor, plus the cycles of shuffles
    cache        bytes of x (and of G) that the kernel's tiles read or write through the L2 cache
    memory       bytes read from or written to memory; data that does not fit in the L2 cache is read again
    latency      the dependency chain of a program. It starts with FIRST. Each iteration of its loop takes the cycles of
                 its products and of its instructions, and SYNC for each barrier, each wait for products and each
                 access to tensor memory. A pipeline of at most two stages loads nothing ahead, so each iteration also
                 takes LOAD. All programs that a multiprocessor holds at once run their chains at the same time

The longest time is the bottleneck, and its name is printed ("launches" if the launches take at least as long). The
kernels are compiled with the tiles of the table. Instructions are counted in their machine code (sass.py), on the path
of a tile that needs no mask. The counts are multiplied by the numbers of loop iterations, which follow from the sizes
of the batch and of the tile. Nothing is fitted to a measurement of these kernels. limits.py has the constants, with the
sources of the latencies. For small batches the CUDA kernel is predicted too (model_cuda.py).

The model ignores bank conflicts, dependencies between the instructions of an iteration, masked tiles, and the host. A
prediction is therefore a lower bound for this code, not an average.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from fastntxent.verification import policy

from . import binary, kernels, model_cuda, sass
from .chips import CHIPS, Chip
from .limits import FIRST, GEMM, LAUNCH, LOAD, SYNC, Time, fill, longest

if TYPE_CHECKING:
    from fastntxent.backends.triton.config import TileConfig

SHAPES = ((256, 128), (4096, 128), (32768, 128), (32768, 768))
TARGETS = ("sm_80", "sm_90", "sm_100")
SMALL = policy.SMALL_BATCH // 2  # largest number of samples for which the CUDA kernel is predicted
STAYS = 2 / 3  # share of the L2 cache in which data survives until the next pass

Tiles = Mapping[str, "TileConfig | None"]  # by kernel


class Work(NamedTuple):
    """A kernel's work, summed over the programs of all its launches. `operands` are the bytes of shared memory that
    tcgen05 reads, which the machine code does not show. `trips` are the iterations of a program's loops, outermost
    first."""

    flops: float
    exps: float
    operands: float
    cache: float
    memory: float
    programs: float
    trips: tuple[float, ...]
    launches: int = 1


def time_of(limits: dict[str, float], launches: int) -> Time:
    """Return the longest limit plus the time of the launches, and the name of the longer of the two."""
    time, launching = longest(limits), LAUNCH * launches
    return Time(time.seconds + launching, time.limit if time.seconds > launching else "launches")


def least(work: Work, chip: Chip, dtype: str, tile: tuple[int, ...], gemm: float | None = None) -> dict[str, float]:
    """Return the seconds for each limit that does not depend on the compiled code. `gemm` is a measured matrix rate in
    flops per second."""
    rates = chip.known_rates
    matrix = kernels.rate(chip, dtype, tile) * (GEMM if gemm is None else gemm / rates.product)
    uneven = _uneven(work, chip)
    active = min(work.programs / work.launches, chip.multiprocessors)
    return {
        "products": work.flops / matrix * uneven,
        "exps": work.exps / rates.exp * uneven,
        "cache": work.cache / (fill(chip, active) * active) / rates.cycles * chip.multiprocessors,
        "memory": work.memory / rates.memory,
    }


def needs(work: Work, report: kernels.CompiledKernel, dtype: str, gemm: float | None = None) -> dict[str, float]:
    """Return the seconds for each limit of a compiled kernel. `gemm` is a measured matrix rate in flops per second."""
    chip, code, tile = CHIPS[report.target], report.machine_code, report.tile
    assert tile is not None
    rates, lanes, trips = chip.known_rates, 32 * report.warps, trips_of(work, report)

    def executed(of: Callable[[sass.Region], float]) -> float:
        """Return the sum of a region's figure over everything that a warp executes, times the number of programs."""
        return code.total(trips, of) * work.programs

    def of_kind(kind: str) -> float:
        return executed(lambda region: region.counts[kind]) * lanes

    shared = 128 * report.warps * executed(lambda region: region.shared)
    operands = 0 if code.main.flops else work.operands
    cycle_rate = rates.cycles / chip.multiprocessors  # cycles per second of one multiprocessor
    held = report.resident or 1
    chain = code.total(trips, lambda region: _chain(region, report)) + FIRST
    rounds = math.ceil(work.programs / work.launches / (chip.multiprocessors * held)) * work.launches
    found = {
        "slots": executed(lambda region: region.slots(report.warps)) / rates.cycles,
        "integers": of_kind("alu") / 64 / rates.cycles,
        "floats": of_kind("fma") / rates.float32 / rates.cycles,
        "exps": of_kind("exp") / rates.exp,
        "shared": (shared + operands) / rates.shared,
    }
    found = {name: seconds * _uneven(work, chip) for name, seconds in found.items()}
    return {**least(work, chip, dtype, tile, gemm), **found, "latency": chain * rounds / cycle_rate}


def trips_of(work: Work, report: kernels.CompiledKernel) -> tuple[float, ...]:
    """Return the numbers of iterations of the loops in the machine code, outermost first.

    If the machine code has more loops than `work.trips`, its outermost loops run once. If it has fewer, the compiler
    has unrolled the innermost loops, and their numbers are left out. If it has partly unrolled the innermost loop, one
    iteration in the machine code does several iterations of the kernel's loop, and the code around the loop does the
    rest.
    """
    code = report.machine_code
    trips = (1.0,) * (code.depth - len(work.trips)) + work.trips[: code.depth]
    unrolled, rest = _unrolled(code.main, report), _unrolled(code.around_main, report)
    if unrolled > 1 and code.depth >= len(work.trips) > 0:
        trips = (*trips[:-1], max(0.0, trips[-1] - rest) / unrolled)
    found, wanted = code.total(trips, lambda region: region.flops) * report.warps, work.flops / work.programs
    right = not code.main.flops or 0.7 < found / wanted < 2.1
    assert right, f"{report.kernel}: {found:.3g} flops per program, not {wanted:.3g}"
    return trips


def _unrolled(region: sass.Region, report: kernels.CompiledKernel) -> int:
    """Return how many iterations of the kernel's innermost loop a region does, without its inner loops."""
    of_iteration = kernels.flops_of_iteration(report.kernel, report.tile, report.d, report.dtype)
    return round(region.flops * report.warps / of_iteration)


def _uneven(work: Work, chip: Chip) -> float:
    """Return the ratio of the busiest multiprocessor's time to the time with evenly distributed programs."""
    rounds = work.programs / work.launches / chip.multiprocessors
    return math.ceil(rounds) / rounds


def _chain(region: sass.Region, report: kernels.CompiledKernel) -> float:
    """Return the cycles of a region without its inner loops, for a program that has the multiprocessor to itself."""
    counts, main, tile = region.counts, report.machine_code.main, report.tile
    assert tile is not None
    flops = region.flops * report.warps
    if not region.flops and counts["tensor"]:  # tcgen05: flops in proportion to the matrix instructions
        flops = report.flops * counts["tensor"] / main.counts["tensor"]
    chip = CHIPS[report.target]
    products = flops / kernels.rate(chip, report.dtype, tile) * chip.known_rates.cycles
    waits = counts["barrier"] + counts["drain"] + counts["tensor memory"]
    ahead = tile[4] > 2
    loads = 0 if ahead else LOAD * max(region is main, _unrolled(region, report))
    return products + region.slots(report.warps) + SYNC * waits + loads


def _tile(tiles: Tiles, kernel: str) -> TileConfig:
    tile = tiles[kernel]
    assert tile is not None
    return tile


def work_of(kernel: str, tiles: Tiles, M: int, DP: int, dtype: str, chip: Chip) -> Work:
    """Return the work of a kernel for NT-Xent of M rows with DP features."""
    from fastntxent.backends.triton import config

    block_m, block_n, block_d, *_ = _tile(tiles, kernel)
    parts, width = (3 if dtype == "fp32" else 1), (2 if dtype == "bf16" else 4)
    pairs, x_bytes = M * M, M * DP * width
    product, row, chunks = 2 * pairs * DP * parts, DP * width, DP / block_d
    stays = STAYS * chip.known_rates.l2
    again = x_bytes if x_bytes > stays else 0  # bytes that each further pass over x reads from memory
    operands = product * (1 / min(block_m, 128) + 1 / block_n)
    if kernel == "direct":
        edge = config.edge_of_square(M, M, max(block_m, block_n))
        squares = math.ceil(M / edge) * (math.ceil(M / edge) + 1) / 2
        trips = (edge / block_n, edge / block_m, chunks)
        of_tile = block_m * row + (0 if block_d == DP else block_n * row)
        memory = x_bytes + (2 * squares * edge * row if again else 0) + 4 * M * M / edge
        cache = squares * trips[0] * trips[1] * of_tile
        return Work(product / 2, pairs / 2, operands / 2, cache, memory, squares, trips)
    if kernel == "owned":
        of_tile = block_n * row + (0 if block_d == DP else block_m * row)
        cache = pairs / (block_m * block_n) * of_tile
        return Work(product, pairs, operands, cache, x_bytes, math.ceil(M / block_m), (M / block_n, chunks))
    if kernel == "fused":
        blocks = math.ceil(M / block_m)
        part_cols = config.columns_of_part(chip.multiprocessors, blocks, M, block_n)
        parts_of_cols = math.ceil(M / part_cols)
        memory = x_bytes + again * blocks / (config.PROGRAMS * chip.multiprocessors) + 8 * parts_of_cols * M * DP
        operands += product / min(block_m, 128)  # one operand of the second product is in registers
        programs = blocks * parts_of_cols
        return Work(2 * product, pairs, operands, pairs / block_m * row, memory, programs, (part_cols / block_n,))
    return _work_of_panels(kernel, tiles, M, DP, dtype, chip)


def _work_of_panels(kernel: str, tiles: Tiles, M: int, DP: int, dtype: str, chip: Chip) -> Work:
    """Return the work of `form` or `gather` (panels.py of the Triton backend).

    A launch handles two squares of G: either two on the diagonal, or one above the diagonal and its transpose. In the
    second case, `form` computes only the square above the diagonal, and writes it twice.
    """
    from fastntxent.backends.triton import config

    block_m, block_n, block_d, *_ = _tile(tiles, kernel)
    parts, width = (3 if dtype == "fp32" else 1), (2 if dtype == "bf16" else 4)
    row, chunks = DP * width, DP / block_d
    edge = config.edge_of_panel(chip.multiprocessors, M, DP, width, _tile(tiles, "gather"))
    squares = math.ceil(M / edge)
    above = squares * (squares - 1) // 2
    launches = math.ceil(squares / 2) + above
    # A panel is two squares of G. If it does not fit in the L2 cache together with its rows of x and the sums of these
    # rows, `form` writes a share `missed` of the panel to memory, and `gather` reads it from there.
    panel, rows, sums = 2 * edge * edge * width, 2 * edge * row, 2 * edge * DP * 4
    missed = max(0.0, 1 - STAYS * chip.known_rates.l2 / (panel + rows + sums))
    memory = launches * (rows + missed * panel)
    if kernel == "form":
        pairs = (squares + above) * edge * edge
        flops, formed = 2 * pairs * DP * parts, pairs / (block_m * block_n)
        operands, cache = flops * (1 / min(block_m, 128) + 1 / block_n), formed * (block_m + block_n) * row
        cache += squares**2 * edge * edge * width  # every square of G is written
        return Work(flops, pairs, operands, cache, memory, formed, (chunks,), launches)
    pairs = squares**2 * edge * edge
    flops, programs = 2 * pairs * DP * parts, pairs / edge / block_m * DP / block_d
    operands, cache = flops * (1 / min(block_m, 128) + 1 / block_d), programs * edge * (block_m + block_d) * width
    return Work(flops, 0, operands, cache, memory + 2 * launches * sums, programs, (edge / block_n,), launches)


def around(M: int, DP: int, dtype: str, chip: Chip, finished: bool) -> float:
    """Return the seconds that the kernels without products take for memory traffic and launches. They pack, finish and
    weight the rows, and unpack the gradient."""
    rates, width = chip.known_rates, 2 if dtype == "bf16" else 4
    read = M * DP * (2 * 2 * width + width)  # a row and its positive are read twice, the row is written once
    back = M * DP * (4 + 2 * width + 4)
    return (read + back) / rates.memory + LAUNCH * (4 if finished else 3)


def predict(
    target: str, n: int, d: int, dtype: str, gemm: float | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """Return times in milliseconds, and the bottleneck of each kernel with products.

    There is a time for each kernel with products, for all other kernels ("around"), for the forward, for forward and
    backward ("both"), and for one product u u^T ("u"). `gemm` is a measured matrix rate in flops per second.
    """
    from fastntxent.backends.triton import config, pack

    chip, M, DP = CHIPS[target], 2 * n, pack.padded_features(d)
    width = 2 if dtype == "bf16" else 4

    tiles = {kernel: config.look_up(chip.family, kernel, width, M, DP) for kernel in config.KERNELS}
    forward = "direct" if tiles["direct"] else "owned"
    backward = ["fused"] if tiles["fused"] else ["form", "gather"]
    times, binds = {}, {}
    for kernel in (forward, *backward):
        shifted = False if kernel in ("fused", "form") else None
        report = kernels.compile_one(target, kernel, dtype, d, "usual", tiles[kernel], shifted)
        work = work_of(kernel, tiles, M, DP, dtype, chip)
        times[kernel], binds[kernel] = time_of(needs(work, report, dtype, gemm), work.launches)
    times["around"] = around(M, DP, dtype, chip, forward == "direct")
    times["forward"] = times[forward] + times["around"] / 2
    times["both"] = sum(times[kernel] for kernel in (forward, *backward, "around"))
    times["u"] = 2 * M * M * d / (gemm or GEMM * chip.known_rates.product)
    return {name: 1e3 * s for name, s in times.items()}, binds


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return predictions for every target, and the reason for each missing backend."""
    shapes = [(n, d) for d in arguments.d or [128] for n in arguments.n or [256, 4096, 32768]]
    results, missing = [], {}
    if binary.built() is None:
        missing["cuda"] = "fastntxent._cuda was not built"
    for target in TARGETS:
        for n, d in shapes if arguments.n or arguments.d else SHAPES:
            for dtype in ("bf16", "fp32"):
                found = {"triton": predict(target, n, d, dtype)}
                if n <= SMALL and not missing:
                    found["cuda"] = model_cuda.predict(target, n, d, dtype)
                for backend, (times, binds) in found.items():
                    size = {"target": target, "n": n, "d": d, "dtype": dtype, "backend": backend}
                    results.append({**size, "ms": times, "limits": binds})
                    print(line(results[-1]), flush=True)
    return results, missing


def line(result: dict) -> str:
    """Return a prediction as a line of text."""
    times: dict[str, float] = result["ms"]
    binds: dict[str, str] = result["limits"]
    size = f"{result['target']:6} N {result['n']}, D {result['d']}, {result['dtype']}, {result['backend']}"
    parts = [f"{name} {ms:.3g}" + (f" ({binds[name]})" if name in binds else "") for name, ms in times.items()]
    return f"{size}: {', '.join(parts)}"
