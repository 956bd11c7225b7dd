"""Suite `tune`: the Triton backend's table of tiles, from measurements on this GPU or, with --predict, from the model.

For every kernel, width of a feature and class of rows and features, the candidates that the compiler fits into the chip
without a spill are timed in turns, as part of the forward or of the backward that they serve; the fastest enters the
table, the others and their times the results. Where two kernels could serve a class (`owned` and `direct`, `fused` and
the panels), the table has the faster. A candidate whose result is not that of the present tile is an error. Nobody's
training is tuned: this is run once for a kind of device, and its table is what the package ships.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch

from . import kernels, limits, machine, model, timing
from .chips import CHIPS

TABLE_PATH = Path("fastntxent/backends/triton/table.json")
FEATURE_CLASSES = {64: 64, 128: 128, 256: 256, None: 768}  # most of a class, and those that stand for it
ROW_CLASSES = {  # most of a class, of every kernel; a rival before the one that gives way to it
    "owned": (1024, None),
    "direct": (1024, None),
    "form": (2048, None),
    "gather": (2048, None),
    "fused": (2048, None),
}
RIVAL = {"direct": "owned", "fused": "gather"}
M_OF = {1024: 512, 2048: 2048, None: 32_768}
REPEATS = 20  # of a step in a CUDA graph: the host's part of a short one is longer than the device's
SPREAD = 1.03  # a predicted time within it counts as the same: the deeper pipeline is taken

Sizes = tuple[int, ...]  # the fields of a config.TileConfig
Best = dict[tuple[str, str, int | None, int | None], tuple[float, Sizes | None]]  # kernel, dtype, rows, features


def candidates(kernel: str, width: int, DP: int) -> Iterator[Sizes]:
    """Every tile worth a compilation: its sums in a thread's registers, its operands in shared memory."""
    sides = (32, 64, 128) if kernel in ("owned", "fused") else (64, 128, 256)
    depths = {"fused": {DP}, "gather": {64, 128, 256}}.get(kernel, {32, 64, DP if DP <= 128 else 64})
    for block_m, block_n, block_d, warps, stages in itertools.product(sides, sides, depths, (4, 8), (2, 3)):
        held, staged = block_m * block_n, (block_m + block_n) * block_d
        if kernel == "fused":
            held, staged = block_m * (block_n + DP), block_n * DP
        elif kernel == "gather":
            held, staged = block_m * block_d, (block_m + block_d) * block_n
        elif kernel == "direct" and block_d == DP:
            staged = block_n * DP
        if block_d <= DP and held <= 128 * 32 * warps and width * staged * stages <= 200 * 2**10:
            yield (block_m, block_n, block_d, warps, stages)
            if warps == 8 and held <= 64 * 32 * warps:
                yield (block_m, block_n, block_d, warps, stages, 128)


def rank(
    target: str, kernel: str, dtype: str, DP: int, M: int, tiles: Iterable[Sizes], most: int
) -> list[tuple[float, Sizes]]:
    """The best tiles without a fault, by the model's seconds: at most so many, and none that the model has behind all
    that were found."""
    from fastntxent.backends.triton import config

    chip, width = CHIPS[target], 2 if dtype == "bf16" else 4
    present = {name: config.look_up(chip.family, name, width, M, DP) for name in config.KERNELS}

    def predicted(tile: Sizes, reports: list[kernels.CompiledKernel]) -> float:
        """Seconds by the model; without a report of the compiled tile, the least that it can take."""
        work = model.work_of(kernel, {**present, kernel: config.TileConfig(*tile)}, M, DP, dtype, chip)
        known = [model.needs(work, report, dtype) for report in reports if report.variant == "usual"]
        bounds = known or [model.least(work, chip, dtype, tile)]
        return min(model.time_of(needs, work.launches).seconds for needs in bounds)

    found: list[tuple[float, Sizes]] = []
    best_first = sorted(((predicted(tile, []), tile) for tile in tiles), key=lambda pair: (pair[0], *_size(pair[1])))
    for least, tile in best_first:
        if len(found) >= most and least >= sorted(found)[most - 1][0]:
            break
        reports = compile_tile(target, kernel, dtype, DP, tile)
        if reports and not any(report.faults() for report in reports):
            found.append((predicted(tile, reports), tile))
    return sorted(found)[:most]


def compile_tile(target: str, kernel: str, dtype: str, DP: int, tile: Sizes) -> list[kernels.CompiledKernel]:
    """What the compiler makes of a tile, in both variants and regimes; nothing if it is over a limit of its own."""
    shifts = (False, True) if kernel in ("fused", "form") else (None,)
    cases = itertools.product(("usual", "general"), shifts)
    try:
        return [kernels.compile_one(target, kernel, dtype, DP, variant, tile, shifted) for variant, shifted in cases]
    except Exception:
        return []


def take(ranked: list[tuple[float, Sizes]]) -> Sizes | None:
    """Of those about as fast as the fastest, the largest tile, and of these the deepest pipeline."""
    fast = [tile for s, tile in ranked if s <= SPREAD * ranked[0][0]]
    return min(fast, key=_size, default=None)


def _size(tile: Sizes) -> tuple[int, int, int]:
    """Largest tiles first, then the deepest pipelines, then the fewest warps."""
    return -math.prod(tile[:3]), -tile[4], tile[3]


def times(kernel: str, dtype: torch.dtype, d: int, M: int, tiles: list[Sizes], seconds: float) -> dict[Sizes, float]:
    """Median seconds of the forward or the backward that the kernel is part of, with each tile in turn."""
    from fastntxent.backends.triton import backend, backward, config, forward, launch, weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    z_i, z_j = (z.detach() for z in timing.Case(M // 2, d, device, dtype).inputs())
    sides = backend._two_views(launch.Work(z_i.device), z_i, z_j, 1 / timing.TEMPERATURE, normalize=True)
    of_nu, totals = forward.losses(sides)

    def work() -> tuple[torch.Tensor, ...]:
        if kernel in ("direct", "owned"):
            again, sums = forward.losses(sides)
            return again.of_rows.neg_lse[: sides.rows.n], sums.sum()
        scaled = weights.scale(sides, of_nu)
        return backward.gradient(sides, scaled, d_pos=of_nu.of_rows.d_neg_lse, totals=totals)

    truth = work()
    calls: dict[Sizes, Callable[[int], timing.Phases]] = {}
    for tile in tiles:
        with taking(kernel, config.TileConfig(*tile)):
            torch.testing.assert_close(work(), truth, rtol=1e-3, atol=1e-5)
            calls[tile] = (_replayed if device == "cuda" else _called)(kernel, config.TileConfig(*tile), work)
    found = timing.interleave(calls, seconds)
    return {tile: sorted(phases["both"])[len(phases["both"]) // 2] for tile, phases in found.items()}


def _called(kernel: str, tile: object, work: Callable[[], object]) -> Callable[[int], timing.Phases]:
    """A call of the work with this tile, timed."""

    def timed(turn: int) -> timing.Phases:
        with taking(kernel, tile):
            start = machine.CLOCKS["cpu"].mark()
            work()
            return {"both": machine.CLOCKS["cpu"].seconds(start, machine.CLOCKS["cpu"].mark())}

    return timed


def _replayed(kernel: str, tile: object, work: Callable[[], object]) -> Callable[[int], timing.Phases]:
    """The same from a CUDA graph of several, without the host's part. To be called while the tile is taken."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            work()

    def timed(turn: int) -> timing.Phases:
        clock = machine.CLOCKS["cuda"]
        start = clock.mark()
        graph.replay()
        return {"both": clock.seconds(start, clock.mark()) / REPEATS}

    return timed


@contextlib.contextmanager
def taking(kernel: str, tile: object) -> Iterator[None]:
    """The backend with this tile for the kernel, and without the one that would go before it."""
    from fastntxent.backends.triton import config

    look_up = config.look_up
    before = {"owned": "direct", "form": "fused", "gather": "fused"}.get(kernel)

    def chosen(family: str, name: str, *rest: int) -> object:
        return tile if name == kernel else None if name == before else look_up(family, name, *rest)

    with mock.patch.object(config, "look_up", chosen):
        yield


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Tune, and write the table after each kernel: what was measured is not lost."""
    target = arguments.predict or _target()
    measured = "" if arguments.predict else f"{torch.cuda.get_device_name()}, {json.dumps(machine.provenance())}"
    results: list[dict[str, object]] = []
    best: Best = {}
    for kernel in [kernel for kernel in ROW_CLASSES if kernel in (arguments.kernels or ROW_CLASSES)]:
        for dtype, rows, (most, d) in itertools.product(("bf16", "fp32"), ROW_CLASSES[kernel], FEATURE_CLASSES.items()):
            ranked = []
            if not (kernel == "fused" and most is None):  # its rows' gradient would be beyond the registers
                ranked = rank(
                    target, kernel, dtype, d, M_OF[rows], candidates(kernel, width_of(dtype), d), arguments.most
                )
            if ranked and not arguments.predict:
                fitting = [tile for _, tile in ranked]
                found = times(kernel, kernels.TORCH[dtype], d, M_OF[rows], fitting, arguments.seconds)
                ranked = sorted((s, tile) for tile, s in found.items())
            s, tile = ranked[0] if ranked else (math.inf, None)
            if arguments.predict:
                tile = take(ranked)
                s += best.get(("form", dtype, rows, most), (0.0, None))[0] if kernel == "gather" else 0.0
                s += limits.LAUNCH if kernel == "direct" else 0.0
            best[kernel, dtype, rows, most] = s, tile
            results.append(
                {"target": target, "kernel": kernel, "dtype": dtype, "d": d, "M": M_OF[rows], "tile": tile}
                | {"ms": {str(list(tile)): 1e3 * s for s, tile in ranked[:10]}}
            )
            print(line(results[-1]), flush=True)
        if arguments.write:
            table = json.loads(TABLE_PATH.read_text())
            merge(table, CHIPS[target].family, kernel, best, measured)
            TABLE_PATH.write_text(dumps(table))
    return results, {}


def width_of(dtype: str) -> int:
    """Bytes of a packed feature."""
    return 2 if dtype == "bf16" else 4


def line(result: dict) -> str:
    """The fastest few, for the screen."""
    times = ", ".join(f"{tile} {ms:.4g}" for tile, ms in list(result["ms"].items())[:3])
    size = f"{result['target']} {result['kernel']} {result['dtype']} D {result['d']} M {result['M']}"
    return f"{size}: {result['tile']} of {times}"


def merge(table: dict, family: str, kernel: str, best: Best, measured: str) -> None:
    """Put a kernel's tiles in the place of the family's old ones: small batches first, then by features; null where
    its rival was found faster."""
    of_family = table.setdefault(family, {"resembles": "large", "measured": {}})
    of_family["measured"][kernel] = measured
    for dtype in ("bf16", "fp32"):
        entries = []
        for (name, of_dtype, rows, most), (s, tile) in best.items():
            if (name, of_dtype) == (kernel, dtype):
                rival = best.get((RIVAL.get(kernel, ""), dtype, rows, most), (math.inf, None))
                entries.append([rows, most, tile if s <= rival[0] else None])
        entries.sort(key=lambda entry: (entry[0] or math.inf, entry[1] or math.inf))
        of_family.setdefault(kernel, {})[str(width_of(dtype))] = entries


def dumps(table: dict) -> str:
    """JSON with a line for each entry."""
    return _indent(table) + "\n"


def _indent(value: object, indent: int = 0) -> str:
    if isinstance(value, dict) and value:
        inside = ",\n".join(f"{' ' * (indent + 1)}{json.dumps(k)}: {_indent(v, indent + 1)}" for k, v in value.items())
        return f"{{\n{inside}\n{' ' * indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"{' ' * (indent + 1)}{json.dumps(v)}" for v in value) + f"\n{' ' * indent}]"
    return json.dumps(value)


def _target() -> str:
    """The chip here."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks tune: needs a CUDA device, or --predict CHIP")
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    if name not in model.TARGETS:
        raise SystemExit(f"python -m benchmarks tune: knows {', '.join(model.TARGETS)}, this is {name}")
    return name
