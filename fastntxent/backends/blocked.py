"""neg_lse in plain PyTorch, a tile of the similarity matrix at a time: runs wherever PyTorch does.

The logits k u u^T are symmetric, so only tiles (I, J) with I <= J are formed. One exponential serves both sides:

    forward    sum_I += E 1,      sum_J += E^T 1         E = exp(k U_I U_J^T), 0 where the ids agree
    backward   A_I   += G U_J,    A_J   += G^T U_I       G = E * (a_I 1^T + 1 a_J^T),  a_i = w_i exp(-nu_i)
    then       d_u = k A,         d_k = (1/2) sum_i u_i . A_i

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
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .base import ComposedBackend, NegLse, accumulation_dtype, row_dots

# Tile edges: 1 MiB of float32 stays in a core's second-level cache; an accelerator wants fewer, larger launches.
_BLOCK_CPU = 512
_BLOCK_ACCELERATOR = 4096

# exp(k s) directly while k max|u|^2 + ln M stays below this: two thirds of the dtype's range of exponents, which
# leaves the products of E with exp(-nu) and with the upstream weights a third to move in.
_DIRECT_LIMIT = {torch.float32: 60.0, torch.float64: 480.0}


class _Tile(NamedTuple):
    rows: slice
    cols: slice
    values: Tensor  # a view of one buffer, which the next tile overwrites
    diagonal: bool


class _Tiles(NegLse):
    """The upper triangle, tile by tile. The two subclasses differ in what they make of a tile's logits."""

    def __init__(self, u: Tensor, ids: Tensor, inv_tau: Tensor):
        self.u = u
        self.scaled = u * inv_tau
        self.ids = ids
        self.inv_tau = inv_tau
        M = u.shape[0]
        block = min(M, _BLOCK_CPU if u.device.type == "cpu" else _BLOCK_ACCELERATOR)
        self.blocks = [slice(start, min(start + block, M)) for start in range(0, M, block)]
        self.buffer, self.scratch = u.new_empty(2, block * block)

    def backward(self, d_neg_lse: Tensor, neg_lse: Tensor) -> tuple[Tensor, Tensor]:
        # A row without negatives has neither a weight, whatever came from behind its -inf, nor probabilities.
        empty = neg_lse == -math.inf
        weights, nu = d_neg_lse.masked_fill(empty, 0), neg_lse.masked_fill(empty, math.inf)
        # Weights of any magnitude (a loss scaler's 2^16, a mean's 1e-6) enter the tiles with the largest at 1.
        scale = weights.abs().amax().clamp_min(torch.finfo(weights.dtype).tiny)
        gathered = torch.zeros_like(self.u)
        for tile, g in self.probabilities(weights / scale, nu):
            gathered[tile.rows].addmm_(g, self.u[tile.cols])
            if not tile.diagonal:
                gathered[tile.cols].addmm_(g.T, self.u[tile.rows])
        gathered *= scale
        d_inv_tau = row_dots(self.u, gathered).sum() * 0.5
        return gathered.mul_(self.inv_tau), d_inv_tau

    @abstractmethod
    def probabilities(self, weights: Tensor, nu: Tensor) -> Iterator[tuple[_Tile, Tensor]]:
        """G of the header for every tile; nu is +inf for a row without negatives."""

    def logits(self) -> Iterator[tuple[_Tile, bool]]:
        """Every tile's logits, and whether ids may agree in it."""
        spans = self._id_spans()
        for i, rows in enumerate(self.blocks):
            for j, cols in enumerate(self.blocks[i:], start=i):
                values = self.tile_of(self.buffer, rows, cols)
                torch.mm(self.scaled[rows], self.u[cols].T, out=values)
                apart = spans is not None and (spans[i][1] < spans[j][0] or spans[j][1] < spans[i][0])
                yield _Tile(rows, cols, values, i == j), not apart

    @staticmethod
    def tile_of(buffer: Tensor, rows: slice, cols: slice) -> Tensor:
        height, width = rows.stop - rows.start, cols.stop - cols.start
        return buffer[: height * width].view(height, width)

    def _id_spans(self) -> list[tuple[int, int]] | None:
        """Each block's smallest and largest id: blocks whose spans do not meet need no mask. Only the CPU may look."""
        if self.ids.device.type != "cpu":
            return None
        return [(int(low), int(high)) for low, high in (self.ids[rows].aminmax() for rows in self.blocks)]


class _DirectTiles(_Tiles):
    """exp(k s) itself: every logit is known to be in range."""

    def __init__(self, u: Tensor, ids: Tensor, inv_tau: Tensor):
        super().__init__(u, ids, inv_tau)
        # Small whole numbers in the rows' own dtype: comparing them into a factor of 0 or 1 takes a seventh of the
        # time of a boolean mask of the integers.
        self.codes = torch.unique(ids, return_inverse=True)[1].to(u.dtype)
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
                tile.values.mul_(torch.ne(self.codes[tile.rows, None], self.codes[tile.cols], out=scratch))
            if len(self.blocks) == 1:
                self.kept = tile
            yield tile

    def forward(self) -> Tensor:
        sums = self.u.new_zeros(self.u.shape[0])
        for rows, cols, exps, diagonal in self.exponentials():
            sums[rows] += exps.sum(dim=1)
            if not diagonal:
                sums[cols] += exps.sum(dim=0)
        return sums.log_()

    def probabilities(self, weights: Tensor, nu: Tensor) -> Iterator[tuple[_Tile, Tensor]]:
        a = weights * torch.exp(-nu)
        for tile in self.exponentials():
            rows, cols, exps, diagonal = tile
            g = self.tile_of(self.scratch, rows, cols)
            if diagonal:
                torch.mul(exps, a[rows, None], out=g)
                yield tile, torch.add(g, g.T, out=exps)
            else:
                yield tile, torch.add(a[rows, None], a[cols], out=g).mul_(exps)


class _ShiftedTiles(_Tiles):
    """exp(k s - maximum) and exp(k s - nu): any range of logits."""

    def masked_logits(self) -> Iterator[_Tile]:
        """Logits, -inf where the ids agree."""
        for tile, mixed in self.logits():
            if mixed:
                tile.values.masked_fill_(self.ids[tile.rows, None] == self.ids[tile.cols], -math.inf)
            yield tile

    def forward(self) -> Tensor:
        peaks = self.u.new_full((self.u.shape[0],), -math.inf)
        sums = torch.zeros_like(peaks)
        for rows, cols, logits, diagonal in self.masked_logits():
            scratch = self.tile_of(self.scratch, rows, cols)
            _fold(peaks[rows], sums[rows], logits, scratch, dim=1)
            if not diagonal:
                _fold(peaks[cols], sums[cols], logits, scratch, dim=0)
        return sums.log_().add_(peaks)

    def probabilities(self, weights: Tensor, nu: Tensor) -> Iterator[tuple[_Tile, Tensor]]:
        for tile in self.masked_logits():
            rows, cols, logits, diagonal = tile
            g = torch.sub(logits, nu[rows, None], out=self.tile_of(self.scratch, rows, cols)).exp_()
            g.mul_(weights[rows, None])
            if diagonal:
                yield tile, torch.add(g, g.T, out=logits)
            else:
                yield tile, g.add_(logits.sub_(nu[cols]).exp_().mul_(weights[cols]))


def _fold(peaks: Tensor, sums: Tensor, logits: Tensor, scratch: Tensor, dim: int) -> None:
    """Take a tile into the running maxima and the sums of exp(logit - maximum), in place."""
    new_peaks = torch.maximum(peaks, logits.amax(dim=dim))
    shift = torch.where(new_peaks == -math.inf, 0, new_peaks)  # -inf - -inf is NaN: a row that has no negative yet
    exps = torch.sub(logits, shift.unsqueeze(dim), out=scratch).exp_()
    sums.mul_(torch.exp(peaks - shift)).add_(exps.sum(dim=dim))
    peaks.copy_(new_peaks)


def _stays_in_range(u: Tensor, inv_tau: Tensor) -> bool:
    """Whether the host can see that exp(k s) does."""
    if u.device.type != "cpu" or inv_tau.device.type != "cpu":
        return False
    largest = torch.linalg.vector_norm(u, dim=1).amax().item() ** 2
    return inv_tau.item() * largest + math.log(u.shape[0]) < _DIRECT_LIMIT[u.dtype]


class BlockedBackend(ComposedBackend):
    def prepare(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> NegLse:
        u = u.to(accumulation_dtype(u.dtype)).contiguous()
        return (_DirectTiles if _stays_in_range(u, inv_tau) else _ShiftedTiles)(u, ids, inv_tau)


BACKEND = BlockedBackend()
