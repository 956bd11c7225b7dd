"""Tiles of the similarity matrix in plain PyTorch, one after the other: of one side its upper triangle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from ..sides import Side

# Tile edges: 1 MiB of float32 stays in a core's second-level cache; an accelerator wants fewer, larger launches.
BLOCK_CPU = 512
BLOCK_ACCELERATOR = 4096


class TileValues(NamedTuple):
    """The logits of a tile, or what is made of them."""

    rows: slice
    cols: slice
    values: Tensor  # a view of one buffer, which the next tile overwrites
    diagonal: bool


class Blocks:
    """A side's rows, in blocks."""

    def __init__(self, side: Side):
        self.u = side.u.to(accumulation_dtype(side.u.dtype)).contiguous()
        self.ids, self.limits = side.ids, side.limits
        M = self.u.shape[0]
        self.size = min(M, BLOCK_CPU if self.u.device.type == "cpu" else BLOCK_ACCELERATOR)
        self.slices = [slice(start, min(start + self.size, M)) for start in range(0, M, self.size)]

    def id_spans(self) -> list[tuple[int, int]] | None:
        """Each block's smallest and largest id: blocks whose spans do not meet need no mask. Only the CPU may look."""
        if self.ids.device.type != "cpu":
            return None
        return [(int(low), int(high)) for low, high in (self.ids[rows].aminmax() for rows in self.slices)]


class Tiles:
    """The tiles of the similarity matrix, of one side its upper triangle. Lists have one item a side; of one side,
    `rows` and `cols` are the same."""

    def __init__(self, sides: Sequence[Blocks], inv_tau: float | Tensor):
        self.sides = sides
        self.rows, self.cols = sides[0], sides[-1]
        self.scaled = self.rows.u * inv_tau
        self.inv_tau = inv_tau
        self.buffer, self.scratch = self.rows.u.new_empty(2, self.rows.size * self.cols.size)

    def logits(self) -> Iterator[tuple[TileValues, bool]]:
        """Every tile's logits, and whether ids may agree in it."""
        row_spans, col_spans = self.rows.id_spans(), self.cols.id_spans()
        one_side = len(self.sides) == 1
        for i, rows in enumerate(self.rows.slices):
            for j, cols in enumerate(self.cols.slices):
                if one_side and j < i:
                    continue
                values = self.tile_of(self.buffer, rows, cols)
                torch.mm(self.scaled[rows], self.cols.u[cols].T, out=values)
                yield TileValues(rows, cols, values, one_side and i == j), _may_meet(row_spans, i, col_spans, j)

    def agree(self, tile: TileValues) -> Tensor:
        """Which rows and columns of a tile are of the same group."""
        return self.rows.ids[tile.rows, None] == self.cols.ids[tile.cols]

    @staticmethod
    def tile_of(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
        """A tile's place in a buffer."""
        height, width = rows.stop - rows.start, cols.stop - cols.start
        return buffer[: height * width].view(height, width)


def _may_meet(row_spans: list[tuple[int, int]] | None, i: int, col_spans: list[tuple[int, int]] | None, j: int) -> bool:
    if row_spans is None or col_spans is None:
        return True
    return row_spans[i][0] <= col_spans[j][1] and col_spans[j][0] <= row_spans[i][1]
