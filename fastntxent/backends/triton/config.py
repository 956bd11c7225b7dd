"""Tile sizes: one table, by kind of device, kernel and features.

A width is a choice between the registers that hold a tile, the shared memory that feeds the matrix units, and the
programs that a device runs at once. The entries are those that the compiler fits into a chip without a spill (`make
kernels-report`); no device has measured them yet. Nothing is tuned while a person trains.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton

from .pack import Packed


@dataclass(frozen=True)
class Tile:
    """block_m rows by block_n columns of the similarity matrix, formed over block_d features at a time."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int = 4
    num_stages: int = 2


KERNELS = ("direct", "shifted", "fused", "form", "gather")
_ANY = math.inf
_PLAIN = Tile(128, 128, 64, 8, 3)

# Largest padded D, and the tile for it. Where `fused` has no entry, its registers would spill: panels serve.
# "large" has 160 KiB of shared memory and more (A100, H100, B200), "small" 64 to 100 KiB (GeForce, MI300). Widths:
# bytes of a packed feature, both parts of a split float32 counted.
_TABLE: dict[tuple[str, str, int], list[tuple[float, Tile]]] = {
    ("large", "direct", 2): [(64, Tile(128, 128, 64, 8, 3)), (128, Tile(128, 128, 128, 8, 3)), (_ANY, _PLAIN)],
    ("large", "direct", 4): [(64, Tile(128, 128, 64, 8, 2)), (_ANY, Tile(128, 128, 32, 8, 2))],
    ("large", "shifted", 2): [(_ANY, _PLAIN)],
    ("large", "shifted", 4): [(_ANY, Tile(64, 64, 32, 4, 2))],
    ("large", "fused", 2): [
        (64, Tile(128, 64, 64, 8, 3)),
        (128, Tile(128, 64, 128, 8, 2)),
        (256, Tile(64, 64, 256, 8, 2)),
    ],
    ("large", "fused", 4): [
        (64, Tile(64, 64, 64, 4, 2)),
        (128, Tile(64, 32, 128, 8, 2)),
    ],
    ("large", "form", 2): [(_ANY, _PLAIN)],
    ("large", "form", 4): [(_ANY, Tile(128, 64, 32, 8, 2))],
    ("large", "gather", 2): [(_ANY, Tile(128, 64, 128, 8, 3))],
    ("large", "gather", 4): [(_ANY, Tile(128, 32, 128, 8, 2))],
    ("small", "direct", 2): [(_ANY, Tile(64, 64, 64, 4, 2))],
    ("small", "direct", 4): [(_ANY, Tile(64, 64, 32, 4, 2))],
    ("small", "shifted", 2): [(_ANY, Tile(64, 64, 64, 4, 2))],
    ("small", "shifted", 4): [(_ANY, Tile(64, 64, 32, 4, 2))],
    ("small", "fused", 2): [
        (64, Tile(64, 32, 64, 4, 2)),
        (128, Tile(64, 32, 128, 4, 2)),
        (256, Tile(64, 32, 256, 8, 1)),
    ],
    ("small", "fused", 4): [
        (64, Tile(64, 32, 64, 4, 2)),
        (128, Tile(32, 32, 128, 4, 1)),
    ],
    ("small", "form", 2): [(_ANY, Tile(64, 64, 64, 4, 2))],
    ("small", "form", 4): [(_ANY, Tile(64, 64, 32, 4, 2))],
    ("small", "gather", 2): [(_ANY, Tile(64, 64, 64, 4, 2))],
    ("small", "gather", 4): [(_ANY, Tile(64, 32, 64, 4, 2))],
}
# Where a family differs from the one it resembles: the compiler's registers on it.
_TABLE |= {
    ("sm_80", "direct", 4): [(_ANY, Tile(64, 64, 64, 4, 2))],
    ("sm_80", "fused", 2): [
        (64, Tile(128, 64, 64, 8, 3)),
        (128, Tile(128, 32, 128, 8, 2)),
        (256, Tile(64, 64, 256, 8, 2)),
    ],
    ("sm_80", "fused", 4): [(64, Tile(64, 32, 64, 4, 2)), (128, Tile(32, 32, 128, 4, 2))],
    ("sm_100", "direct", 2): [(64, Tile(128, 128, 32, 8, 3)), (_ANY, _PLAIN)],
    ("sm_100", "fused", 2): [
        (64, Tile(128, 64, 64, 8, 3)),
        (128, Tile(128, 32, 128, 8, 2)),
        (256, Tile(64, 64, 256, 8, 2)),
    ],
    ("sm_100", "form", 2): [(_ANY, Tile(128, 64, 64, 8, 3))],
    ("gfx942", "fused", 2): [(64, Tile(64, 32, 64, 4, 2)), (128, Tile(64, 32, 128, 4, 2))],
}
_RESEMBLES = {"sm_80": "large", "sm_90": "large", "sm_100": "large", "gfx942": "small"}

for _kernel in KERNELS:
    for _width in (2, 4):  # blocks that show many tiles at small sizes
        _TABLE["interpreter", _kernel, _width] = [(256 if _kernel == "fused" else _ANY, Tile(32, 32, 64))]


def choose(kernel: str, rows: Packed) -> Tile:
    """The tile of a kernel for these rows on their device."""
    return look_up(family(rows.x.device), kernel, width(rows), rows.DP)


def look_up(family: str, kernel: str, width: int, DP: int) -> Tile:
    """An entry of the table; block_d is no more than there is."""
    tile = next(tile for largest, tile in _entries(family, kernel, width) if largest >= DP)
    return replace(tile, block_d=min(tile.block_d, DP))


def _entries(family: str, kernel: str, width: int) -> list[tuple[float, Tile]]:
    own = family, kernel, width
    return _TABLE[own if own in _TABLE else (_RESEMBLES[family], kernel, width)]


def fuses(family: str, width: int, DP: int) -> bool:
    """Whether a program of `fused` can hold its rows' gradient."""
    return any(largest >= DP for largest, _ in _entries(family, "fused", width))


def width(rows: Packed) -> int:
    """Bytes of a packed feature."""
    return rows.x.element_size() * (2 if rows.split else 1)


@functools.cache
def family(device: torch.device) -> str:
    """Whose tiles a device takes."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return name if name in _RESEMBLES else "small"


def tiles_of_square(n_rows: int, n_cols: int, block: int) -> int:
    """Tiles along the edge of a program's square: as many as leave a thousand programs, at most eight."""
    tiles = 8
    while tiles > 1 and triton.cdiv(n_rows, block * tiles) * triton.cdiv(n_cols, block * tiles) < 2000:
        tiles //= 2
    return tiles
