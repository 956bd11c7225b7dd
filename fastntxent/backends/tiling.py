"""The similarity matrix in plain PyTorch, one tile at a time. With one side, only the upper triangle is computed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from ..sides import Side

# Tile edges. On a CPU, 1 MiB of float32 stays in a core's L2 cache. An accelerator needs fewer, larger launches.
BLOCK_CPU = 512
BLOCK_ACCELERATOR = 4096


class TileValues(NamedTuple):
    """The logits of a tile, or values computed from them in place."""

    rows: slice
    cols: slice
    values: Tensor  # a view of a buffer that the next tile overwrites
    diagonal: bool


class Blocks:
    """A side's rows, cut into blocks."""

    def __init__(self, side: Side):
        self.u = side.u.to(accumulation_dtype(side.u.dtype)).contiguous()
        self.ids, self.limits = side.ids, side.limits
        M = self.u.shape[0]
        self.size = min(M, BLOCK_CPU if self.u.device.type == "cpu" else BLOCK_ACCELERATOR)
        self.slices = [slice(start, min(start + self.size, M)) for start in range(0, M, self.size)]

    def id_spans(self) -> list[tuple[int, int]] | None:
        """Return each block's smallest and largest id, or None if the ids are not in host memory.

        A tile needs no mask if the spans of its two blocks do not overlap.
        """
        if self.ids.device.type != "cpu":
            return None
        return [(int(low), int(high)) for low, high in (self.ids[rows].aminmax() for rows in self.slices)]


class Tiles:
    """The tiles of the similarity matrix. With one side, only the tiles of the upper triangle.

    `sides` has one or two items. With one item, `rows` and `cols` are the same object.
    """

    def __init__(self, sides: Sequence[Blocks], inv_tau: float | Tensor):
        self.sides = sides
        self.rows, self.cols = sides[0], sides[-1]
        self.inv_tau = inv_tau
        self.buffer, self.scratch = self.rows.u.new_empty(2, self.rows.size * self.cols.size)

    def logits(self) -> Iterator[tuple[TileValues, bool]]:
        """Yield every tile of logits, and whether it may contain pairs with equal ids."""
        row_spans, col_spans = self.rows.id_spans(), self.cols.id_spans()
        one_side = len(self.sides) == 1
        for i, rows in enumerate(self.rows.slices):
            for j, cols in enumerate(self.cols.slices):
                if one_side and j < i:
                    continue
                values = self.tile_of(self.buffer, rows, cols)
                self.fill(values, rows, cols)
                yield TileValues(rows, cols, values, one_side and i == j), _may_meet(row_spans, i, col_spans, j)

    def fill(self, values: Tensor, rows: slice, cols: slice) -> None:
        """Write a tile's logits into `values`."""
        torch.mm(self._scaled[rows], self.cols.u[cols].T, out=values)

    @functools.cached_property
    def _scaled(self) -> Tensor:
        return self.rows.u * self.inv_tau

    def agree(self, tile: TileValues) -> Tensor:
        """Return the mask of a tile's pairs that are in the same group."""
        return self.rows.ids[tile.rows, None] == self.cols.ids[tile.cols]

    @staticmethod
    def tile_of(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
        """Return a view of a buffer in the shape of a tile."""
        height, width = rows.stop - rows.start, cols.stop - cols.start
        return buffer[: height * width].view(height, width)


class CalledTiles(Tiles):
    """Tiles whose similarities come from a function of the row ids and the column ids."""

    def __init__(
        self,
        row_ids: Tensor,
        col_ids: Tensor,
        similarities: Callable[[Tensor, Tensor], Tensor],
        inv_tau: float | Tensor,
        dtype: torch.dtype,
    ):
        sides = [Side(torch.empty(len(ids), 0, dtype=dtype, device=ids.device), ids) for ids in (row_ids, col_ids)]
        super().__init__(list(map(Blocks, sides)), inv_tau)
        self._similarities = similarities

    def fill(self, values: Tensor, rows: slice, cols: slice) -> None:
        torch.mul(self._similarities(self.rows.ids[rows], self.cols.ids[cols]), self.inv_tau, out=values)


def fold(peaks: Tensor, sums: Tensor, logits: Tensor, scratch: Tensor, dim: int) -> None:
    """Update the running maxima and the sums of exp(logit - maximum) with a tile, in place."""
    new_peaks = torch.maximum(peaks, logits.amax(dim=dim))
    shift = torch.where(new_peaks == -math.inf, 0, new_peaks)  # no negative so far: -inf - -inf would be NaN
    exps = torch.sub(logits, shift.unsqueeze(dim), out=scratch).exp_()
    sums.mul_(torch.exp(peaks - shift)).add_(exps.sum(dim=dim))
    peaks.copy_(new_peaks)


def _may_meet(row_spans: list[tuple[int, int]] | None, i: int, col_spans: list[tuple[int, int]] | None, j: int) -> bool:
    if row_spans is None or col_spans is None:
        return True
    return row_spans[i][0] <= col_spans[j][1] and col_spans[j][0] <= row_spans[i][1]
