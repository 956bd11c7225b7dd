"""neg_lse in plain PyTorch, a tile of the similarity matrix at a time: runs wherever PyTorch does.

The logits k u u^T are symmetric, so only tiles (I, J) with I <= J are formed. One exponential serves both sides:

    forward    sum_I += E 1,      sum_J += E^T 1         E = exp(k U_I U_J^T), 0 where the ids agree
    backward   A_I   += G U_J,    A_J   += G^T U_I       G = E * (a_I 1^T + 1 a_J^T),  a_i = w_i exp(-nu_i)
    then       d_u = k A,         d_k = (1/2) sum_i u_i . A_i

Rows against other columns take the same steps over all tiles, the columns with sums and gradients of their own; d_k is
then sum_i u_i . A_i of the rows.

With u = 2 M^2 D flops that is u/2 forward and 3u/2 backward: the 2u schedule. A diagonal tile is formed whole and
used from one side only. Memory: O(M D) and two tiles of B x B. The order of every sum is fixed, so a result has the
same bits each time on the same device and number of threads.

exp(k s) itself is formed where the host can see that no logit leaves the range of the dtype (CPU tensors). Elsewhere
- small temperatures, rows that are not unit rows, tensors whose values only the device knows - rows and columns carry
a running maximum, and the backward forms exp(k s - nu) for both sides.

A logit is rounded to eps k |s|, and (i, j) need not round as (j, i) does. What went into a row's sum must come out of
its probabilities, or their error is that of the logit: so a diagonal tile, whose sums were taken by rows, adds the
transpose of its weighted probabilities, and an off-diagonal one serves both sides with the same logit.

A batch of a single tile keeps E for its backward.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .base import ComposedBackend, NegLse, Side, accumulation_dtype, largest_of, row_dots

# Tile edges: 1 MiB of float32 stays in a core's second-level cache; an accelerator wants fewer, larger launches.
_BLOCK_CPU = 512
_BLOCK_ACCELERATOR = 4096

# exp(k s) directly while k max|u|^2 + ln M stays below this: two thirds of the dtype's range of exponents, which
# leaves the products of E with exp(-nu) and with the upstream weights a third to move in.
_DIRECT_LIMIT = {torch.float32: 60.0, torch.float64: 480.0}

# The factors w exp(-nu) of that form, with the largest w at 1, stay between this and its inverse.
_SMALLEST_FACTOR = {torch.float32: 1e-35, torch.float64: 1e-300}

# With a shift no factor is larger than its weight: the largest weight lies in the middle of the range above 1.
_LARGEST_WEIGHT = {torch.float32: 2.0**64, torch.float64: 2.0**512}


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    values: Tensor  # a view of one buffer, which the next tile overwrites
    diagonal: bool


class _Blocks:
    """A side's rows, in blocks."""

    def __init__(self, side: Side):
        self.u = side.u.to(accumulation_dtype(side.u.dtype)).contiguous()
        self.ids = side.ids
        M = self.u.shape[0]
        self.size = min(M, _BLOCK_CPU if self.u.device.type == "cpu" else _BLOCK_ACCELERATOR)
        self.slices = [slice(start, min(start + self.size, M)) for start in range(0, M, self.size)]

    def id_spans(self) -> list[tuple[int, int]] | None:
        """Each block's smallest and largest id: blocks whose spans do not meet need no mask. Only the CPU may look."""
        if self.ids.device.type != "cpu":
            return None
        return [(int(low), int(high)) for low, high in (self.ids[rows].aminmax() for rows in self.slices)]


class _Tiles(NegLse):
    """The tiles of the similarity matrix, of one side its upper triangle. The two subclasses differ in what they make
    of a tile's logits. Lists have one item a side; of one side, `rows` and `cols` are the same."""

    def __init__(self, sides: Sequence[_Blocks], inv_tau: Tensor):
        self.sides = sides
        self.rows, self.cols = sides[0], sides[-1]
        self.scaled = self.rows.u * inv_tau
        self.inv_tau = inv_tau
        self.top = 1.0  # the largest weight that `probabilities` takes
        self.buffer, self.scratch = self.rows.u.new_empty(2, self.rows.size * self.cols.size)

    def backward(
        self, d_neg_lse: Sequence[Tensor], neg_lse: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[list[Tensor | None], Tensor]:
        # A row without negatives has neither a weight, whatever came from behind its -inf, nor probabilities.
        empty = [nu == -math.inf for nu in neg_lse]
        weights = [w.masked_fill(none, 0) for w, none in zip(d_neg_lse, empty, strict=True)]
        nus = [nu.masked_fill(none, math.inf) for nu, none in zip(neg_lse, empty, strict=True)]
        # Weights of any magnitude (a loss scaler's 2^16, a mean's 1e-6) enter the tiles with the largest between 1 and
        # `top`, unchanged if it lies there.
        largest = largest_of(*weights)
        unit = largest / largest.clamp(1.0, self.top)
        # What the rows gather gives the temperature's gradient too; of two sides, the columns' may not be needed.
        gathered = [torch.zeros_like(self.rows.u)]
        if len(self.sides) > 1 and needs[1]:
            gathered.append(torch.zeros_like(self.cols.u))
        of_cols = gathered[-1] if len(gathered) == len(self.sides) else None
        for tile, g in self.probabilities([w / unit for w in weights], nus):
            gathered[0][tile.rows].addmm_(g, self.cols.u[tile.cols])
            if of_cols is not None and not tile.diagonal:
                of_cols[tile.cols].addmm_(g.T, self.rows.u[tile.rows])
        d_inv_tau = row_dots(self.rows.u, gathered[0]).sum() * unit / (3 - len(self.sides))
        for d_u in gathered:
            d_u.mul_(self.inv_tau).mul_(unit)  # their product may overflow where the gradient does not
        d_sides = [gathered[0], of_cols][: len(self.sides)]
        return [d_u if need else None for d_u, need in zip(d_sides, needs, strict=True)], d_inv_tau

    @abstractmethod
    def probabilities(self, weights: list[Tensor], nus: list[Tensor]) -> Iterator[tuple[_Tile, Tensor]]:
        """G of the header for every tile; nu is +inf for a row without negatives."""

    def logits(self) -> Iterator[tuple[_Tile, bool]]:
        """Every tile's logits, and whether ids may agree in it."""
        row_spans, col_spans = self.rows.id_spans(), self.cols.id_spans()
        one_side = len(self.sides) == 1
        for i, rows in enumerate(self.rows.slices):
            for j, cols in enumerate(self.cols.slices):
                if one_side and j < i:
                    continue
                values = self.tile_of(self.buffer, rows, cols)
                torch.mm(self.scaled[rows], self.cols.u[cols].T, out=values)
                yield _Tile(rows, cols, values, one_side and i == j), _may_meet(row_spans, i, col_spans, j)

    @staticmethod
    def tile_of(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
        height, width = rows.stop - rows.start, cols.stop - cols.start
        return buffer[: height * width].view(height, width)


def _may_meet(row_spans: list[tuple[int, int]] | None, i: int, col_spans: list[tuple[int, int]] | None, j: int) -> bool:
    if row_spans is None or col_spans is None:
        return True
    return row_spans[i][0] <= col_spans[j][1] and col_spans[j][0] <= row_spans[i][1]


class _DirectTiles(_Tiles):
    """exp(k s) itself: every logit is known to be in range."""

    def __init__(self, sides: Sequence[_Blocks], inv_tau: Tensor):
        super().__init__(sides, inv_tau)
        # Small whole numbers in the rows' own dtype: comparing them into a factor of 0 or 1 takes a seventh of the
        # time of a boolean mask of the integers.
        codes = torch.unique(torch.cat([side.ids for side in sides]), return_inverse=True)[1].to(self.rows.u.dtype)
        self.codes = codes.split([len(side.ids) for side in sides])
        self.kept: _Tile | None = None

    def exponentials(self) -> Iterator[_Tile]:
        """E of the header for every tile."""
        if self.kept is not None:
            yield self.kept
            return
        for tile, mixed in self.logits():
            tile.values.exp_()
            if mixed:
                scratch = self.tile_of(self.scratch, tile.rows, tile.cols)
                of_rows, of_cols = self.codes[0][tile.rows, None], self.codes[-1][tile.cols]
                tile.values.mul_(torch.ne(of_rows, of_cols, out=scratch))
            if len(self.rows.slices) == len(self.cols.slices) == 1:
                self.kept = tile
            yield tile

    def forward(self) -> tuple[Tensor, ...]:
        sums = [side.u.new_zeros(side.u.shape[0]) for side in self.sides]
        for rows, cols, exps, diagonal in self.exponentials():
            sums[0][rows] += exps.sum(dim=1)
            if not diagonal:
                sums[-1][cols] += exps.sum(dim=0)
        return tuple(total.log_() for total in sums)

    def backward(
        self, d_neg_lse: Sequence[Tensor], neg_lse: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[list[Tensor | None], Tensor]:
        weights, nu = torch.cat(list(d_neg_lse)).double().abs(), torch.cat(list(neg_lse)).double()
        factors = (weights / largest_of(weights) * torch.exp(-nu))[(weights > 0) & (nu > -math.inf)]
        least = _SMALLEST_FACTOR[self.rows.u.dtype]
        if factors.numel() and not (least < factors.amin() and factors.amax() < 1 / least):
            return _ShiftedTiles(self.sides, self.inv_tau).backward(d_neg_lse, neg_lse, needs)
        return super().backward(d_neg_lse, neg_lse, needs)

    def probabilities(self, weights: list[Tensor], nus: list[Tensor]) -> Iterator[tuple[_Tile, Tensor]]:
        scaled = [w * torch.exp(-nu) for w, nu in zip(weights, nus, strict=True)]
        for tile in self.exponentials():
            rows, cols, exps, diagonal = tile
            g = self.tile_of(self.scratch, rows, cols)
            if diagonal:
                torch.mul(exps, scaled[0][rows, None], out=g)
                yield tile, torch.add(g, g.T, out=exps)
            else:
                yield tile, torch.add(scaled[0][rows, None], scaled[-1][cols], out=g).mul_(exps)


class _ShiftedTiles(_Tiles):
    """exp(k s - maximum) and exp(k s - nu): any range of logits, and of weights."""

    def __init__(self, sides: Sequence[_Blocks], inv_tau: Tensor):
        super().__init__(sides, inv_tau)
        self.top = _LARGEST_WEIGHT[self.rows.u.dtype]

    def masked_logits(self) -> Iterator[_Tile]:
        """Logits, -inf where the ids agree."""
        for tile, mixed in self.logits():
            if mixed:
                agree = self.rows.ids[tile.rows, None] == self.cols.ids[tile.cols]
                tile.values.masked_fill_(agree, -math.inf)
            yield tile

    def forward(self) -> tuple[Tensor, ...]:
        peaks = [side.u.new_full((side.u.shape[0],), -math.inf) for side in self.sides]
        sums = [torch.zeros_like(peak) for peak in peaks]
        for rows, cols, logits, diagonal in self.masked_logits():
            scratch = self.tile_of(self.scratch, rows, cols)
            _fold(peaks[0][rows], sums[0][rows], logits, scratch, dim=1)
            if not diagonal:
                _fold(peaks[-1][cols], sums[-1][cols], logits, scratch, dim=0)
        return tuple(total.log_().add_(peak) for total, peak in zip(sums, peaks, strict=True))

    def probabilities(self, weights: list[Tensor], nus: list[Tensor]) -> Iterator[tuple[_Tile, Tensor]]:
        for tile in self.masked_logits():
            rows, cols, logits, diagonal = tile
            g = torch.sub(logits, nus[0][rows, None], out=self.tile_of(self.scratch, rows, cols)).exp_()
            g.mul_(weights[0][rows, None])
            if diagonal:
                yield tile, torch.add(g, g.T, out=logits)
            else:
                yield tile, g.add_(logits.sub_(nus[-1][cols]).exp_().mul_(weights[-1][cols]))


def _fold(peaks: Tensor, sums: Tensor, logits: Tensor, scratch: Tensor, dim: int) -> None:
    """Take a tile into the running maxima and the sums of exp(logit - maximum), in place."""
    new_peaks = torch.maximum(peaks, logits.amax(dim=dim))
    shift = torch.where(new_peaks == -math.inf, 0, new_peaks)  # -inf - -inf is NaN: a row that has no negative yet
    exps = torch.sub(logits, shift.unsqueeze(dim), out=scratch).exp_()
    sums.mul_(torch.exp(peaks - shift)).add_(exps.sum(dim=dim))
    peaks.copy_(new_peaks)


def _stays_in_range(sides: Sequence[_Blocks], inv_tau: Tensor) -> bool:
    """Whether the host can see that exp(k s) does."""
    rows, cols = sides[0].u, sides[-1].u
    if rows.device.type != "cpu" or inv_tau.device.type != "cpu":
        return False
    longest = [torch.linalg.vector_norm(side.u, dim=1).amax().item() for side in sides]
    terms = math.log(max(rows.shape[0], cols.shape[0]))
    return inv_tau.item() * longest[0] * longest[-1] + terms < _DIRECT_LIMIT[rows.dtype]


class BlockedBackend(ComposedBackend):
    def prepare(self, sides: Sequence[Side], inv_tau: Tensor) -> NegLse:
        blocks = [_Blocks(side) for side in sides]
        return (_DirectTiles if _stays_in_range(blocks, inv_tau) else _ShiftedTiles)(blocks, inv_tau)


BACKEND = BlockedBackend()
