"""The tile sizes of the kernels: a table by device family, kernel, bytes per feature, and a batch's rows and features.

A tile size trades off the registers that hold the tile, the shared memory that feeds the matrix units, and the number
of programs that a multiprocessor runs at once. With two programs, the exponentials of one overlap the products of the
other. The table is `table.json`, written by `python -m benchmarks tune`; nothing is tuned during training. A family's
"measured" says which kernels' tiles have been timed, and on which device. The tiles of all other kernels, except the
VARIANTS below, come from the model (`python -m benchmarks model`). The model chose among tiles that have no spills in
Triton 3.9 (`make kernels-report`) and at most 48 bytes of spills in Triton 3.6.

    {family: {kernel: {width: [[rows, features, tile], ...]}}}

The entry used is the first one whose rows and features are at least the batch's rows and padded features (null: any).
`width` is the bytes per packed feature, counting both parts of a float32 that is stored in two parts. If a tile is
null, other kernels run instead: `owned`, which is faster in small batches, instead of `direct`; `form` and `gather`
instead of `fused`, whose registers would spill; `form_pairs` and `gather` instead of `pairs`, for the same reason. If a
family has no entries for a kernel and width, the entries of the family named in "resembles" are used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .pack import PADDED_ROWS, Packed


class TileConfig(NamedTuple):
    """block_m rows by block_n columns of the similarity matrix, computed block_d features at a time.

    A tile of `gather` is block_m rows by block_d features of the result, computed block_n columns at a time. maxnreg
    limits the registers per thread, so that two programs can run at once. None leaves the number to the compiler.
    """

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """Return the launch options of this tile."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# Set by `forced`. "rows" replaces the number of rows in look-ups; "tiles" is the number of tiles along a square's edge.
_forced: dict[str, int] = {}

KERNELS = ("direct", "owned", "fused", "form", "gather")
# The kernels for sigmoid losses and for limits use these tiles in place of the tiles of `owned`, `fused` and `form`.
# The model does not cover these kernels; their tiles were chosen among those that compile without spills.
VARIANTS = {"owned": "sums", "fused": "pairs", "form": "form_pairs"}
TABLE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "table.json").read_text())
PROGRAMS = 2  # programs that each multiprocessor should have
FEWEST_SQUARES = 2000  # squares wanted in the full matrix; with one side, half of them become programs
PLANES = 128  # the most squares along a side; there is a plane of sums for each of them (forward.py)
PANEL = 32 * 2**20  # bytes of two squares of G, which fit into the L2 cache of an A100 or H100 together with x


def choose(kernel: str, rows: Packed, n: int | None = None) -> TileConfig | None:
    """Return the tile of a kernel for these rows on their device, or None. `n` replaces the number of rows."""
    return look_up(family(rows.x.device), kernel, width(rows), rows.n if n is None else n, rows.DP)


def tile(kernel: str, rows: Packed, n: int | None = None) -> TileConfig:
    """Return the tile that `choose` returns, which must not be None."""
    chosen = choose(kernel, rows, n)
    assert chosen is not None
    return chosen


def look_up(family: str, kernel: str, width: int, n: float, DP: int) -> TileConfig | None:
    """Return the tile of the first matching entry, with block_d reduced to a divisor of DP. The tile may be None.
    `n` may be infinite."""
    n = _forced.get("rows", n)
    entry = next(tile for rows, features, tile in entries(family, kernel, width) if rows >= n and features >= DP)
    if entry is None:
        return None
    return entry._replace(block_d=math.gcd(entry.block_d, DP))


@functools.cache
def entries(family: str, kernel: str, width: int) -> list[tuple[float, float, TileConfig | None]]:
    """Return a kernel's entries in the table, each with its largest numbers of rows and features, and its tile."""
    said = TABLE[family].get(kernel, {}).get(str(width))
    if said is None:
        return entries(TABLE[family]["resembles"], kernel, width)
    return [(rows or math.inf, features or math.inf, tile and TileConfig(*tile)) for rows, features, tile in said]


def forms(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the forms that `forced` takes.

    They are "", one form for each range of rows in the table, with squares of one tile, and one form with squares of
    eight tiles.
    """
    widths = (4,) if dtype == torch.float32 else (2,)
    limits = {
        int(rows)
        for kernel in KERNELS
        for width in widths
        for rows, _, _ in entries(family(device), kernel, width)
        if rows < math.inf
    }
    largest = max(limits, default=0) + 1
    parts = sorted({*limits, largest}) if limits else []  # with a single range of rows there is no choice
    return ["", *(f"rows={rows} tiles=1" for rows in parts), f"rows={largest} tiles=8"]


@contextlib.contextmanager
def forced(form: str) -> Iterator[None]:
    """Return a context in which every call uses the tiles of a form."""
    global _forced
    before, _forced = _forced, {key: int(value) for key, value in (word.split("=") for word in form.split())}
    try:
        yield
    finally:
        _forced = before


def forced_now() -> tuple[tuple[str, int], ...]:
    """Return the settings of the current `forced` context."""
    return tuple(_forced.items())


def split(rows: Packed) -> int:
    """Return the constant SPLIT: `products_at_once` for float32 rows in two parts, else 0."""
    return products_at_once(chip(rows.x.device)) if rows.split else 0


def products_at_once(chip: str) -> int:
    """Return how many half-precision products the matrix units add before they round.

    It is 16 since Hopper (and in the interpreter), and 8 before. AMD's units do not round toward zero. The large value
    for them makes the correction in `tiles.add_product` 0.
    """
    if chip.startswith("gfx"):
        return 128
    return 8 if chip.startswith("sm_8") else 16


def rows_held(chip: str) -> int:
    """Return the constant ROWS_HELD: how many elements of a tile's column, 8 rows apart, one thread holds.

    With mma and wgmma it is two; with tensor memory and AMD's matrix units it is one.
    """
    return 2 if chip.startswith(("sm_8", "sm_9", "sm_12", "interpreter")) else 1


def width(rows: Packed) -> int:
    """Return the bytes per packed feature."""
    return rows.x.element_size() * (2 if rows.split else 1)


def family(device: torch.device) -> str:
    """Return the table's family for a device: a B300 uses the B200's tiles, and an unknown chip uses "small"."""
    name = {"sm_103": "sm_100"}.get(chip(device), chip(device))
    return name if name in TABLE else "small"


@functools.cache
def chip(device: torch.device) -> str:
    """Return the device's architecture by its compiler name, such as sm_90 or gfx942."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors. The interpreter counts as four, although it runs programs one by one."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def edge_of_square(n_rows: int, n_cols: int, block: int) -> int:
    """Return the edge of a program's square of tiles, as a number of rows.

    The edge is the longest of 8, 4 and 2 tiles with which there are at least FEWEST_SQUARES squares, else one tile. It
    grows beyond that if a side would otherwise have more than PLANES squares, so that the memory for sums stays O(M).
    """
    if "tiles" in _forced:
        return _forced["tiles"] * block
    tiles = 8
    while tiles > 1 and triton.cdiv(n_rows, block * tiles) * triton.cdiv(n_cols, block * tiles) < FEWEST_SQUARES:
        tiles //= 2
    while triton.cdiv(max(n_rows, n_cols), block * tiles) > PLANES:
        tiles *= 2
    return tiles * block


def columns_of_part(multiprocessors: int, blocks: int, n_cols: int, block_n: int) -> int:
    """Return how many columns one program processes: all, or fewer if the device would not have enough programs."""
    wanted = triton.cdiv(PROGRAMS * multiprocessors, blocks)
    return triton.cdiv(triton.cdiv(n_cols, block_n), wanted) * block_n


def edge_of_panel(multiprocessors: int, n: int, DP: int, width: int, gather: TileConfig) -> int:
    """Return the edge of a panel's two squares.

    PANEL and the number of rows set an upper limit. Among the sizes above half of that limit, the result is the one
    that leaves the fewest multiprocessors idle.
    """
    largest = max(math.isqrt(PANEL // (2 * width)) // PADDED_ROWS, 1) * PADDED_ROWS
    largest = min(largest, triton.cdiv(n, PADDED_ROWS) * PADDED_ROWS)

    def idle(edge: int) -> float:
        rounds = triton.cdiv(2 * edge, gather.block_m) * (DP // gather.block_d) / multiprocessors
        return math.ceil(rounds) / rounds

    return min(range(largest, largest // 2, -PADDED_ROWS), key=idle)
