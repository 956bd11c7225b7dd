"""The predicted time of the CUDA kernel, which runs all phases of a small batch in one launch.

In each phase a block runs its tasks one after the other. Between two phases, the blocks wait for each other at a
barrier, which takes BARRIER. A task loops over tiles of columns, and a tile loops over steps of one chunk of features
each. The time of a task is the sum of

    steps    for each step, the longest of four times: its instructions, its products, its bytes from the L2 cache, and
             its latency. The latency is the sum of a barrier, a wait for copies and a load from shared memory (SYNC
             each), and four products that add to the same sums, one after the other (PRODUCT each)
    tiles    for each tile, the part outside its steps: exponentials and, in the gradient, the second product
    rest     the part outside the tiles, and two dependent loads (LOAD each) before the first tile

Instructions are counted in the built module (sass.py). PRODUCT is the latency of m16n8k16, 32 to 33 cycles on A100 and
H100 (Luo et al., arXiv 2402.13499). BARRIER is the time of a cooperative-groups grid barrier on a V100 (Zhang et al.,
"A Study of Single and Multi-device Synchronization Methods in Nvidia GPUs", 2020). Our barrier should take no longer.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

from . import binary, sass
from .binary import WARPS
from .chips import CHIPS, Chip
from .limits import FIRST, GEMM, LAUNCH, LOAD, SYNC, Time, fill, longest

PRODUCT = 33  # cycles
BARRIER, BARRIERS = 1.5e-6, 3  # seconds of a barrier; one barrier after each of the phases pack, sums and finish
# As in csrc/cuda/arguments.h.
ROWS, CHUNK, GROUP, MOST_COL_SHARES, COL_WARPS = 32, 64, 3, 16, 4


class Plan(NamedTuple):
    """How csrc/cuda/plan.h splits a call.

    Attributes:
        grid: blocks of the launch.
        held: blocks that a multiprocessor holds at once.
        col_shares: tasks that share the columns of a block of rows in the forward.
        group: chunks of features that a task of the gradient sums.
        chunks: chunks of features of a row.
        cols: columns of a tile.
        row_blocks: blocks of rows.
        tiles: tiles of columns.
    """

    grid: int
    held: int
    col_shares: int
    group: int
    chunks: int
    cols: int
    row_blocks: int
    tiles: int


def plan(chip: Chip, registers: int, M: int, D: int, parts: int) -> Plan:
    """Return the plan for M rows compared with themselves. `parts` is 2 for float32, whose operands are two float16
    parts, and 1 for other dtypes."""
    cols, chunks = 128 // parts, math.ceil(D / CHUNK)
    row_blocks, tiles = math.ceil(M / ROWS), math.ceil(M / cols)

    def shared(group: int) -> int:
        stages = group + 2
        vectors = 2 * (cols * (8 + 3 * 4) + cols // 32 * 4)

        def held(row_slots: int) -> int:
            return 2 * parts * (stages * cols * CHUNK + row_slots * ROWS * CHUNK) + vectors

        return held(chunks) if held(chunks) <= chip.shared else held(stages)

    largest = max(group for group in range(1, min(chunks, GROUP) + 1) if shared(group) <= chip.shared)
    held = chip.resident(registers, shared(largest), WARPS)
    assert held
    capacity = chip.multiprocessors * held
    group = min(
        range(largest, 0, -1),
        key=lambda group: math.ceil(row_blocks * math.ceil(chunks / group) / capacity) * (chunks + group),
    )
    col_shares = min(
        range(1, min(tiles, MOST_COL_SHARES) + 1),
        key=lambda col_shares: math.ceil(row_blocks * col_shares / capacity) * math.ceil(tiles / col_shares),
    )
    tasks = max(row_blocks * col_shares, row_blocks * math.ceil(chunks / group), math.ceil(M / WARPS))
    return Plan(min(tasks, capacity), held, col_shares, group, chunks, cols, row_blocks, tiles)


class Phase(NamedTuple):
    """A phase with products: the forward's sums, or the gradient.

    Attributes:
        tasks: tasks of all blocks.
        tiles: tiles of a task.
        summed: chunks of features that a task of the gradient sums; 0 in the forward.
    """

    tasks: int
    tiles: int
    summed: int


def time_of_phase(task: sass.Region, phase: Phase, cut: Plan, chip: Chip, parts: int) -> Time:
    """Return the seconds of a phase, and the bottleneck of its steps. `task` is the machine code of a task."""
    rates = chip.known_rates
    tile = task.loop
    assert tile is not None
    step = tile.main
    active = min(phase.tasks, cut.grid, chip.multiprocessors)
    blocks = math.ceil(min(phase.tasks, cut.grid) / chip.multiprocessors)  # per multiprocessor
    of_product = rates.by_warps / rates.cycles  # flops per cycle of a multiprocessor

    def slots(instructions: float) -> float:
        return instructions * WARPS * blocks / sass.SCHEDULERS

    bytes_of_step = 2 * parts * cut.cols * CHUNK * blocks
    limits = {
        "slots": slots(step.instructions),
        "products": step.flops * WARPS * blocks / of_product,
        "cache": bytes_of_step / fill(chip, active),
        "latency": 3 * SYNC + CHUNK // 16 * PRODUCT,
    }
    of_step = longest(limits)
    share = phase.summed / GROUP  # the part of the second product that runs: its machine code is for GROUP chunks
    rest = tile.ways[round(tile.counts["tensor"] * share)]
    second = cut.cols // COL_WARPS // 16 * PRODUCT if phase.summed else 0
    of_tile = max(slots(rest), tile.flops * share * WARPS * blocks / of_product) + second
    of_task = phase.tiles * (cut.chunks * of_step.seconds + of_tile) + slots(task.instructions) + 2 * LOAD
    rounds = math.ceil(phase.tasks / cut.grid)
    return Time(rounds * of_task * chip.multiprocessors / rates.cycles, of_step.limit)


def predict(target: str, n: int, d: int, dtype: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return times in milliseconds, and the bottlenecks, of a loss and its gradient in one launch.

    There is a time for each phase with products ("sums", "gradient"), for everything else ("around"), for the whole
    launch ("both"), and for one product u u^T ("u").
    """
    chip, M, parts = CHIPS[target], 2 * n, 2 if dtype == "fp32" else 1
    rates = chip.known_rates
    program, registers = built_kernel(target, "split" if parts == 2 else "bfloat")
    cut = plan(chip, registers, M, d, parts)
    sides = sorted((loop for loop in program.inner if loop.tensor), key=lambda loop: loop.tensor)
    tasks = [loop.loop for loop in sides if loop.loop]  # each phase has a loop over sides, with a loop over tasks in it
    assert len(tasks) == 2, "the machine code is not a forward's sums and a gradient"
    groups = math.ceil(cut.chunks / cut.group)
    phases = {
        "sums": Phase(cut.row_blocks * cut.col_shares, math.ceil(cut.tiles / cut.col_shares), 0),
        "gradient": Phase(cut.row_blocks * groups, cut.tiles, min(cut.group, cut.chunks)),
    }
    found = {
        name: time_of_phase(task, phase, cut, chip, parts)
        for task, (name, phase) in zip(tasks, phases.items(), strict=True)
    }
    # For packing, finishing the rows and the totals, each instruction is counted once. These parts also wait for loads
    # from memory (FIRST) and from the L2 cache (LOAD).
    others = sum(loop.total([], lambda region: region.instructions) for loop in program.inner if not loop.tensor)
    cycles = (program.instructions + others) * WARPS / sass.SCHEDULERS + FIRST + 6 * LOAD
    times = {name: time.seconds for name, time in found.items()}
    times["around"] = cycles * chip.multiprocessors / rates.cycles + BARRIERS * BARRIER + LAUNCH
    times["both"] = sum(times.values())
    times["u"] = 2 * M * M * d / (GEMM * rates.product)
    return {name: 1e3 * s for name, s in times.items()}, {name: time.limit for name, time in found.items()} | {
        "around": "barriers"
    }


@functools.cache
def built_kernel(target: str, operands: str) -> tuple[sass.Region, int]:
    """Return a kernel of the built module for a chip, and its registers per thread."""
    module = binary.built()
    if module is None:
        raise FileNotFoundError("fastntxent._cuda was not built")
    usage = sass.output_of("cuobjdump", "--dump-resource-usage", "-arch", target, module)
    registers = re.search(rf"Function \S*kernel_{operands}_cu\S*:\s*REG:(\d+)", usage)
    assert registers, f"no kernel of {operands} for {target}"
    return next(region for name, region in built_programs(target).items() if f"kernel_{operands}_cu" in name), int(
        registers[1]
    )


@functools.cache
def built_programs(target: str) -> dict[str, sass.Region]:
    """Return every kernel of the built module for a chip."""
    module = binary.built()
    assert module is not None
    return sass.programs(module, target)
