"""Suite `tune`: the Triton backend's table of tiles, from measurements on this GPU or, with --predict, from the model.

The table has an entry for every kernel, number of bytes per feature, and class of rows and features. The candidates for
an entry are tiles that compile without faults, such as spills, on this chip. The suite keeps those with the shortest
predicted times, at most --most of them, and times them in turn, each in a whole forward or backward. The fastest enters
the table, and the ten shortest times enter the results. With --predict nothing is timed: among the tiles whose
predicted times are within 3 % of the shortest, the largest enters the table.

For some classes two kernels can do the same work. The entry of the preferred kernel (`direct`, `fused`) is null if its
rival (`owned`; `form` with `gather`) was faster in the same run. A candidate whose result differs from that of the
current tile is an error.

The suite runs once per kind of device, and the package ships the resulting table. Nothing is tuned during training.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from . import kernels, limits, machine, model, timing
from .chips import CHIPS

TABLE_PATH = Path("fastntxent/backends/triton/table.json")
FEATURE_CLASSES = {64: 64, 128: 128, 256: 256, None: 768}  # upper bound of a class -> features that represent it
DTYPES = ("bf16", "fp32")
ROW_CLASSES = {  # upper bounds of each kernel's classes of rows; rivals come first, because `merge` needs their times
    "owned": (1024, None),
    "direct": (1024, None),
    "form": (2048, None),
    "gather": (2048, None),
    "fused": (2048, None),
}
RIVAL = {"direct": "owned", "fused": "gather"}
M_OF = {1024: 512, 2048: 2048, None: 32_768}
REPEATS = 20  # steps per CUDA graph: in a short step the host takes longer than the device
SPREAD = 1.03  # predicted times within this factor count as equal; `take` prefers the largest tile

Sizes = tuple[int, ...]  # the fields of a config.TileConfig
Each = Callable[[Callable[[Sizes], float | None], list[Sizes]], Iterable[float | None]]  # `map`, or a pool's
Best = dict[tuple[str, str, int | None, int | None], tuple[float, Sizes | None]]  # kernel, dtype, rows, features


def candidates(kernel: str, width: int, DP: int) -> Iterator[Sizes]:
    """Yield every tile worth compiling: its sums fit in registers and its operands in shared memory."""
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
    target: str,
    kernel: str,
    dtype: str,
    DP: int,
    M: int,
    tiles: Iterable[Sizes],
    most: int,
    each: Each = map,
    at_once: int = 1,
) -> list[tuple[float, Sizes]]:
    """Return at most `most` tiles without faults, fastest first, with the seconds that the model predicts.

    `each` compiles tiles in batches of `at_once`, smallest lower bounds first. A tile is skipped if `most` tiles of
    earlier batches have times no longer than its lower bound.
    """
    seconds = functools.partial(predicted, target, kernel, dtype, DP, M)
    best_first = sorted(((seconds(tile), tile) for tile in tiles), key=lambda pair: (pair[0], *_size(pair[1])))
    found: list[tuple[float, Sizes]] = []
    for first in range(0, len(best_first), at_once):
        slowest = sorted(found)[most - 1][0] if len(found) >= most else math.inf
        promising = [tile for least, tile in best_first[first : first + at_once] if least < slowest]
        if not promising:
            break
        times = each(functools.partial(seconds_if_compiled, target, kernel, dtype, DP, M), promising)
        found += [(s, tile) for s, tile in zip(times, promising, strict=True) if s is not None]
    return sorted(found)[:most]


def seconds_if_compiled(target: str, kernel: str, dtype: str, DP: int, M: int, tile: Sizes) -> float | None:
    """Compile a tile, and return the seconds that the model predicts, or None if it does not compile without faults."""
    reports = compile_tile(target, kernel, dtype, DP, tile)
    if not reports or any(report.faults() for report in reports):
        return None
    return predicted(target, kernel, dtype, DP, M, tile, reports)


def predicted(
    target: str,
    kernel: str,
    dtype: str,
    DP: int,
    M: int,
    tile: Sizes,
    reports: Sequence[kernels.CompiledKernel] = (),
) -> float:
    """Return the model's seconds. Without a report of the compiled tile this is a lower bound."""
    from fastntxent.backends.triton import config

    chip, width = CHIPS[target], width_of(dtype)
    present = {name: config.look_up(chip.family, name, width, M, DP) for name in config.KERNELS}
    work = model.work_of(kernel, {**present, kernel: config.TileConfig(*tile)}, M, DP, dtype, chip)
    known = [model.needs(work, report, dtype) for report in reports if report.variant == "usual"]
    bounds = known or [model.least(work, chip, dtype, tile)]
    return min(model.time_of(needs, work.launches).seconds for needs in bounds)


def compile_tile(target: str, kernel: str, dtype: str, DP: int, tile: Sizes) -> list[kernels.CompiledKernel]:
    """Return the reports of a tile in all variants and regimes; an empty list if one of them does not compile."""
    from triton.errors import TritonError

    shifts = (False, True) if kernel in ("fused", "form") else (None,)
    cases = itertools.product(("usual", "general"), shifts)
    try:
        return [kernels.compile_one(target, kernel, dtype, DP, variant, tile, shifted) for variant, shifted in cases]
    except (RuntimeError, TritonError):  # a compiler pass or ptxas failed
        return []


def take(ranked: list[tuple[float, Sizes]]) -> Sizes | None:
    """Return the largest of the tiles that are about as fast as the fastest; among equals, the deepest pipeline."""
    fast = [tile for s, tile in ranked if s <= SPREAD * ranked[0][0]]
    return min(fast, key=_size, default=None)


def _size(tile: Sizes) -> tuple[int, int, int]:
    """Return the sort key: largest tiles first, then the deepest pipelines, then the fewest warps."""
    return -math.prod(tile[:3]), -tile[4], tile[3]


def times(kernel: str, dtype: torch.dtype, d: int, M: int, tiles: list[Sizes], seconds: float) -> dict[Sizes, float]:
    """Return the median seconds of the kernel's forward or backward with each tile; the tiles take turns."""
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
    """Return a function that times one call of the work with this tile."""

    def timed(turn: int) -> timing.Phases:
        with taking(kernel, tile):
            start = machine.CLOCKS["cpu"].mark()
            work()
            return {"both": machine.CLOCKS["cpu"].seconds(start, machine.CLOCKS["cpu"].mark())}

    return timed


def _replayed(kernel: str, tile: object, work: Callable[[], object]) -> Callable[[int], timing.Phases]:
    """Like `_called`, but replay a CUDA graph of several calls, which leaves out the host's time. Call it inside
    `taking(kernel, tile)`."""
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
    """Use this tile for the kernel, and disable the kernel that would be preferred to it."""
    from fastntxent.backends.triton import config

    look_up = config.look_up
    before = {"owned": "direct", "form": "fused", "gather": "fused"}.get(kernel)

    def chosen(family: str, name: str, *rest: int) -> object:
        return tile if name == kernel else None if name == before else look_up(family, name, *rest)

    with mock.patch.object(config, "look_up", chosen):
        yield


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Tune, and return the results. With --write, update the table after each kernel, so that an interruption loses
    only the kernel in progress."""
    if arguments.write and (arguments.d or arguments.tiles):
        raise SystemExit("error: --write replaces all of a kernel's entries: leave out --d and --tiles")
    known = {
        tile
        for kernel, dtype, d in itertools.product(
            arguments.kernels or ROW_CLASSES, DTYPES, features_of(arguments).values()
        )
        for tile in candidates(kernel, width_of(dtype), d)
    }
    for tile in arguments.tiles or ():
        if tile not in known:
            raise SystemExit(f"error: no kernel has the candidate {','.join(map(str, tile))} with these options")
    if arguments.workers == 1:
        return _tune(arguments, map)
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
        return _tune(arguments, pool.map)


def _tune(arguments: argparse.Namespace, each: Each) -> tuple[list[dict[str, object]], dict[str, str]]:
    target = arguments.predict or _target()
    measured = None if arguments.predict else f"{torch.cuda.get_device_name()}, {json.dumps(machine.provenance())}"
    results: list[dict[str, object]] = []
    best: Best = {}
    for kernel in [kernel for kernel in ROW_CLASSES if kernel in (arguments.kernels or ROW_CLASSES)]:
        for dtype, rows, (most, d) in itertools.product(DTYPES, ROW_CLASSES[kernel], features_of(arguments).items()):
            ranked = []
            if not (kernel == "fused" and most is None):  # a gradient this wide would not fit in registers
                tiles = candidates(kernel, width_of(dtype), d)
                tiles = (tile for tile in tiles if arguments.tiles is None or tile in arguments.tiles)
                ranked = rank(target, kernel, dtype, d, M_OF[rows], tiles, arguments.most, each, arguments.workers)
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


def features_of(arguments: argparse.Namespace) -> dict[int | None, int]:
    """Return the entries of FEATURE_CLASSES that are to be tuned."""
    return {most: d for most, d in FEATURE_CLASSES.items() if d in (arguments.d or FEATURE_CLASSES.values())}


def width_of(dtype: str) -> int:
    """Return the bytes of a packed feature."""
    return 2 if dtype == "bf16" else 4


def line(result: dict) -> str:
    """Return the fastest tiles as a line of text."""
    times = ", ".join(f"{tile} {ms:.4g}" for tile, ms in list(result["ms"].items())[:3])
    size = f"{result['target']} {result['kernel']} {result['dtype']} D {result['d']} M {result['M']}"
    return f"{size}: {result['tile']} of {times}"


def merge(table: dict, family: str, kernel: str, best: Best, measured: str | None) -> None:
    """Replace the family's entries for a kernel. `measured` names the GPU on which the tiles were timed, or is None if
    they were predicted.

    Entries are ordered by rows, then by features. An entry is null if no tile fits or the kernel's rival was faster.
    """
    of_family = table.setdefault(family, {"resembles": "large", "measured": {}})
    if measured is None:
        of_family["measured"].pop(kernel, None)
    else:
        of_family["measured"][kernel] = measured
    for dtype in DTYPES:
        entries = []
        for (name, of_dtype, rows, most), (s, tile) in best.items():
            if (name, of_dtype) == (kernel, dtype):
                rival = best.get((RIVAL.get(kernel, ""), dtype, rows, most), (math.inf, None))
                entries.append([rows, most, tile if s <= rival[0] else None])
        entries.sort(key=lambda entry: (entry[0] or math.inf, entry[1] or math.inf))
        of_family.setdefault(kernel, {})[str(width_of(dtype))] = entries


def dumps(table: dict) -> str:
    """Return JSON with one line per entry."""
    return _indent(table) + "\n"


def _indent(value: object, indent: int = 0) -> str:
    if isinstance(value, dict) and value:
        inside = ",\n".join(f"{' ' * (indent + 1)}{json.dumps(k)}: {_indent(v, indent + 1)}" for k, v in value.items())
        return f"{{\n{inside}\n{' ' * indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(f"{' ' * (indent + 1)}{json.dumps(v)}" for v in value) + f"\n{' ' * indent}]"
    return json.dumps(value)


def _target() -> str:
    """Return the name of this machine's chip."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks tune: needs a CUDA device, or --predict CHIP")
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    if name not in model.TARGETS:
        raise SystemExit(f"python -m benchmarks tune: supports {', '.join(model.TARGETS)}, but this is {name}")
    return name
