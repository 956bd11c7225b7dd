"""Which tiles a kernel takes: one table, by kind of device, kernel, and the batch's rows, features and width.

A tile is a choice between the registers that hold it, the shared memory that feeds the matrix units, and the programs
that a multiprocessor runs at once: where there are two, one's exponentials run beside the other's products.
`table.json` is the table; `python -m benchmarks tune` writes it, and nothing is tuned while a person trains. Where
"measured" says nothing of a kernel, no device has timed its tiles: they come from the model (`python -m benchmarks
model`), among those that Triton 3.9 compiles without a spill (`make kernels-report`) and 3.6 with 48 bytes at most.

    {family: {kernel: {width: [[rows, features, tile], ...]}}}

The first entry serves that has at least the batch's rows and its padded features (null: any). `width` is the bytes of a
packed feature, both parts of a split float32 counted. A tile of null means another kernel: `owned` in the place of
`direct`, `form` and `gather` in that of `fused`, whose registers would spill. What a family does not say is said by the
one it resembles.
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
    """block_m rows by block_n columns of the similarity matrix, formed over block_d features at a time; maxnreg, where
    there is one, is the most registers of a thread: fewer than the compiler would take let two programs run at once."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told of it."""
        limit = {} if self.maxnreg is None else {"maxnreg": self.maxnreg}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


# What `forced` makes of every call: as many rows, for the choice of tiles; as many tiles along a program's square.
_forced: dict[str, int] = {}

KERNELS = ("direct", "owned", "fused", "form", "gather")
# Tiles of the kernels for sigmoid losses and for limits, in the place of those of `owned`, `fused` and `form`. They are
# not from the model, which has no such kernels: they are among those that compile without a spill.
VARIANTS = {"owned": "sums", "fused": "pairs", "form": "form_pairs"}
TABLE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "table.json").read_text())
PROGRAMS = 2  # that a multiprocessor should have to run
FEWEST_SQUARES = 2000  # of all rows against all columns; of one side the half of them, a thousand, are programs
PLANES = 128  # of sums, one for each square of a side
PANEL = 32 * 2**20  # bytes of two squares of G: what an A100's and an H100's second-level cache hold beside x


def choose(kernel: str, rows: Packed, n: int | None = None) -> TileConfig | None:
    """The tile of a kernel for these rows (or n, where more than their number counts) on their device."""
    return look_up(family(rows.x.device), kernel, width(rows), rows.n if n is None else n, rows.DP)


def tile(kernel: str, rows: Packed, n: int | None = None) -> TileConfig:
    """The same, where there is one."""
    chosen = choose(kernel, rows, n)
    assert chosen is not None
    return chosen


def look_up(family: str, kernel: str, width: int, n: int, DP: int) -> TileConfig | None:
    """The first entry that serves; block_d divides what there is."""
    n = _forced.get("rows", n)
    entry = next(tile for rows, features, tile in entries(family, kernel, width) if rows >= n and features >= DP)
    if entry is None:
        return None
    return entry._replace(block_d=math.gcd(entry.block_d, DP))


@functools.cache
def entries(family: str, kernel: str, width: int) -> list[tuple[float, float, TileConfig | None]]:
    """A kernel's part of the table: the most rows, the most features, and the tile."""
    said = TABLE[family].get(kernel, {}).get(str(width))
    if said is None:
        return entries(TABLE[family]["resembles"], kernel, width)
    return [(rows or math.inf, features or math.inf, tile and TileConfig(*tile)) for rows, features, tile in said]


def forms(device: torch.device, dtype: torch.dtype) -> list[str]:
    """What `forced` takes: a number of rows for each part of the table, and squares of one tile and of eight."""
    widths = (4,) if dtype == torch.float32 else (2,)
    limits = {
        int(rows)
        for kernel in KERNELS
        for width in widths
        for rows, _, _ in entries(family(device), kernel, width)
        if rows < math.inf
    }
    largest = max(limits, default=0) + 1
    parts = sorted({*limits, largest}) if limits else []  # a table of one part has one choice
    return ["", *(f"rows={rows} tiles=1" for rows in parts), f"rows={largest} tiles=8"]


@contextlib.contextmanager
def forced(form: str) -> Iterator[None]:
    """A block in which every call takes the tiles of a form."""
    global _forced
    before, _forced = _forced, {key: int(value) for key, value in (word.split("=") for word in form.split())}
    try:
        yield
    finally:
        _forced = before


def forced_now() -> tuple[tuple[str, int], ...]:
    """The form of a block that we are in."""
    return tuple(_forced.items())


def split(rows: Packed) -> int:
    """The kernels' SPLIT: 0, or of float32 rows the products that the matrix units add before they round."""
    return products_at_once(chip(rows.x.device)) if rows.split else 0


def products_at_once(chip: str) -> int:
    """Of half precision: 16 since Hopper (and in the interpreter), 8 before. AMD's do not round toward zero: as if they
    added all at once."""
    if chip.startswith("gfx"):
        return 128
    return 8 if chip.startswith("sm_8") else 16


def rows_held(chip: str) -> int:
    """The kernels' ROWS_HELD: how many rows of a tile, 8 apart, one thread holds of a column. mma and wgmma leave two
    there; tensor memory and AMD's matrix units do not."""
    return 2 if chip.startswith(("sm_8", "sm_9", "sm_12", "interpreter")) else 1


def width(rows: Packed) -> int:
    """Bytes of a packed feature."""
    return rows.x.element_size() * (2 if rows.split else 1)


def family(device: torch.device) -> str:
    """Whose tiles a device takes: a B300 a B200's, a chip that the table does not name those of small ones."""
    name = {"sm_103": "sm_100"}.get(chip(device), chip(device))
    return name if name in TABLE else "small"


@functools.cache
def chip(device: torch.device) -> str:
    """A device's kind, as compilers name it."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many run at once; the interpreter, one after the other, is shown several."""
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def edge_of_square(n_rows: int, n_cols: int, block: int) -> int:
    """Rows and columns of a program's square of tiles: as large as leaves FEWEST_SQUARES, eight tiles at most; but no
    more than PLANES squares along a side, so that their sums stay O(M)."""
    if "tiles" in _forced:
        return _forced["tiles"] * block
    tiles = 8
    while tiles > 1 and triton.cdiv(n_rows, block * tiles) * triton.cdiv(n_cols, block * tiles) < FEWEST_SQUARES:
        tiles //= 2
    while triton.cdiv(max(n_rows, n_cols), block * tiles) > PLANES:
        tiles *= 2
    return tiles * block


def columns_of_part(multiprocessors: int, blocks: int, n_cols: int, block_n: int) -> int:
    """Columns that one program of `fused` goes through: all, or as few as give every multiprocessor its programs."""
    wanted = triton.cdiv(PROGRAMS * multiprocessors, blocks)
    return triton.cdiv(triton.cdiv(n_cols, block_n), wanted) * block_n


def edge_of_panel(multiprocessors: int, n: int, DP: int, width: int, gather: TileConfig) -> int:
    """Rows of each of a panel's two squares: of all sizes from half the largest, one that leaves the fewest
    multiprocessors idle."""
    largest = max(math.isqrt(PANEL // (2 * width)) // PADDED_ROWS, 1) * PADDED_ROWS
    largest = min(largest, triton.cdiv(n, PADDED_ROWS) * PADDED_ROWS)

    def idle(edge: int) -> float:
        rounds = triton.cdiv(2 * edge, gather.block_m) * (DP // gather.block_d) / multiprocessors
        return math.ceil(rounds) / rounds

    return min(range(largest, largest // 2, -PADDED_ROWS), key=idle)
