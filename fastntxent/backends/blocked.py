"""neg_lse in plain PyTorch, one tile of the similarity matrix at a time. It runs wherever PyTorch does.

The logits k u u^T are symmetric, so only tiles (I, J) with I <= J are computed. A tile is used for its rows I and for
its columns J:

    forward    sum_I += E 1,      sum_J += E^T 1         E = exp(k U_I U_J^T), 0 where the ids agree
    backward   A_I   += G U_J,    A_J   += G^T U_I       G = E * (a_I 1^T + 1 a_J^T),  a_i = w_i exp(-nu_i)
    then       d_u = k A,         d_k = (1/2) sum_i u_i . A_i

w_i is the upstream gradient of nu_i, and s below is a similarity. With two sides (rows against different columns) the
same steps run over all tiles, the columns have separate sums and gradients, and d_k is sum_i u_i . A_i over the rows.

With u = 2 M^2 D flops this costs u/2 forward and 3u/2 backward, 2u in all. A diagonal tile is computed whole, and only
its rows are summed. Memory is O(M D) plus a few tiles of B x B. The order of every sum is fixed, so results are bitwise
reproducible on the same device with the same number of threads.

If the host can see that no exponential leaves the range of the dtype (CPU tensors only), exp(k s) is computed directly.
Otherwise (small temperatures, long rows, similarity limits, values that only the device knows) the forward keeps a
running maximum for each row and each column, and the backward computes exp(k s - nu) for the rows and for the columns.

A logit has a rounding error of about k |s| times the dtype's machine epsilon, and the logits of (i, j) and (j, i) may
be rounded differently. The backward must use the same rounded logit that the forward added to a row's sum; otherwise
the probabilities inherit the error. An off-diagonal tile satisfies this, because both passes use the same logit for
row i and for column j. The forward sums a diagonal tile by rows only, so the backward computes the weighted
probabilities of the rows and adds their transpose.

If exp(k s) is computed directly and the batch fits into one tile, E is kept for the backward.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..algebra import row_dots
from ..sides import Side
from .base import Upstream
from .composed import ComposedBackend, PreparedNegLse, largest_magnitude
from .ranges import DIRECT_LIMIT, LARGEST_WEIGHT, SMALLEST_FACTOR
from .tiling import Blocks, Tiles, TileValues, fold


class _NegLseTiles(Tiles, PreparedNegLse):
    """The common part of both regimes, which differ in how they exponentiate a tile's logits."""

    top = 1.0  # the largest weight that `probabilities` supports

    def backward(self, upstreams: Sequence[Upstream]) -> tuple[list[Tensor | None], Tensor]:
        # In a row without negatives, the upstream gradient is ignored and all probabilities are 0.
        empty = [upstream.neg_lse == -math.inf for upstream in upstreams]
        weights = [each.d_neg_lse.masked_fill(none, 0) for each, none in zip(upstreams, empty, strict=True)]
        nus = [each.neg_lse.masked_fill(none, math.inf) for each, none in zip(upstreams, empty, strict=True)]
        # Weights may have any magnitude (2^16 from a loss scaler, 1e-6 from a mean). Scale them so that the largest
        # lies between 1 and `top`; if it already does, they stay unchanged.
        largest = largest_magnitude(*weights)
        unit = largest / largest.clamp(1.0, self.top)
        # The rows' gradient is always computed, because d_k follows from it. The columns' gradient is optional.
        gathered = [torch.zeros_like(self.rows.u)]
        if len(self.sides) > 1 and upstreams[1].wanted:
            gathered.append(torch.zeros_like(self.cols.u))
        of_cols = gathered[-1] if len(gathered) == len(self.sides) else None
        for tile, g in self.probabilities([w / unit for w in weights], nus):
            gathered[0][tile.rows].addmm_(g, self.cols.u[tile.cols])
            if of_cols is not None and not tile.diagonal:
                of_cols[tile.cols].addmm_(g.T, self.rows.u[tile.rows])
        d_inv_tau = row_dots(self.rows.u, gathered[0]).sum() * unit / (3 - len(self.sides))
        for d_u in gathered:
            d_u.mul_(self.inv_tau).mul_(unit)  # one factor at a time: their product could overflow
        d_sides = [gathered[0], of_cols][: len(self.sides)]
        return [d_u if each.wanted else None for d_u, each in zip(d_sides, upstreams, strict=True)], d_inv_tau

    @abstractmethod
    def probabilities(self, weights: list[Tensor], nus: list[Tensor]) -> Iterator[tuple[TileValues, Tensor]]:
        """Yield every tile with its G (see the module docstring). nu is +inf for a row without negatives."""


class _DirectTiles(_NegLseTiles):
    """The direct regime: exp(k s) itself, because every logit is known to be in range."""

    def __init__(self, sides: Sequence[Blocks], inv_tau: float | Tensor):
        super().__init__(sides, inv_tau)
        # Renumber the ids as small whole numbers in the dtype of the rows. Comparing these numbers gives a mask of 0.0
        # and 1.0. Multiplying by it takes a seventh of the time of applying a boolean mask from integer ids.
        codes = torch.unique(torch.cat([side.ids for side in sides]), return_inverse=True)[1].to(self.rows.u.dtype)
        self.codes = codes.split([len(side.ids) for side in sides])
        self.kept: TileValues | None = None

    def exponentials(self) -> Iterator[TileValues]:
        """Yield every tile of E (see the module docstring)."""
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

    def backward(self, upstreams: Sequence[Upstream]) -> tuple[list[Tensor | None], Tensor]:
        weights = torch.cat([each.d_neg_lse for each in upstreams]).double().abs()
        nu = torch.cat([each.neg_lse for each in upstreams]).double()
        factors = (weights / largest_magnitude(weights) * torch.exp(-nu))[(weights > 0) & (nu > -math.inf)]
        least = SMALLEST_FACTOR[self.rows.u.dtype]
        if factors.numel() and not (least < factors.amin() and factors.amax() < 1 / least):
            return _ShiftedTiles(self.sides, self.inv_tau).backward(upstreams)
        return super().backward(upstreams)

    def probabilities(self, weights: list[Tensor], nus: list[Tensor]) -> Iterator[tuple[TileValues, Tensor]]:
        scaled = [w * torch.exp(-nu) for w, nu in zip(weights, nus, strict=True)]
        for tile in self.exponentials():
            rows, cols, exps, diagonal = tile
            g = self.tile_of(self.scratch, rows, cols)
            if diagonal:
                torch.mul(exps, scaled[0][rows, None], out=g)
                yield tile, torch.add(g, g.T, out=exps)
            else:
                yield tile, torch.add(scaled[0][rows, None], scaled[-1][cols], out=g).mul_(exps)


class _ShiftedTiles(_NegLseTiles):
    """The shifted regime: exp(k s - maximum) and exp(k s - nu), for logits and weights of any range."""

    def __init__(self, sides: Sequence[Blocks], inv_tau: float | Tensor):
        super().__init__(sides, inv_tau)
        self.top = LARGEST_WEIGHT[self.rows.u.dtype]

    def counted(self, tile: TileValues, *, of_cols: bool = False) -> Tensor:
        """Return a tile's logits, with -inf where a similarity exceeds the limit of its row.

        With `of_cols`, the limits of the columns apply instead.
        """
        side, part = (self.cols, tile.cols) if of_cols else (self.rows, tile.rows)
        if side.limits is None:
            return tile.values
        limits = side.limits[part] * self.inv_tau
        return tile.values.masked_fill(tile.values > (limits if of_cols else limits[:, None]), -math.inf)

    def masked_logits(self) -> Iterator[TileValues]:
        """Yield every tile of logits, with -inf where the ids agree."""
        for tile, mixed in self.logits():
            if mixed:
                tile.values.masked_fill_(self.agree(tile), -math.inf)
            yield tile

    def forward(self) -> tuple[Tensor, ...]:
        peaks = [side.u.new_full((side.u.shape[0],), -math.inf) for side in self.sides]
        sums = [torch.zeros_like(peak) for peak in peaks]
        for tile in self.masked_logits():
            rows, cols, _, diagonal = tile
            scratch = self.tile_of(self.scratch, rows, cols)
            fold(peaks[0][rows], sums[0][rows], self.counted(tile), scratch, dim=1)
            if not diagonal:
                fold(peaks[-1][cols], sums[-1][cols], self.counted(tile, of_cols=True), scratch, dim=0)
        return tuple(total.log_().add_(peak) for total, peak in zip(sums, peaks, strict=True))

    def probabilities(self, weights: list[Tensor], nus: list[Tensor]) -> Iterator[tuple[TileValues, Tensor]]:
        for tile in self.masked_logits():
            rows, cols, logits, diagonal = tile
            g = torch.sub(self.counted(tile), nus[0][rows, None], out=self.tile_of(self.scratch, rows, cols)).exp_()
            g.mul_(weights[0][rows, None])
            if diagonal:
                yield tile, torch.add(g, g.T, out=logits)
            else:
                of_cols = self.counted(tile, of_cols=True)
                yield tile, g.add_(of_cols.sub_(nus[-1][cols]).exp_().mul_(weights[-1][cols]))


def _stays_in_range(sides: Sequence[Blocks], inv_tau: float | Tensor) -> bool:
    """Return whether the host can see that exp(k s) stays in range."""
    rows, cols = sides[0].u, sides[-1].u
    if rows.device.type != "cpu" or isinstance(inv_tau, Tensor):
        return False
    longest = [torch.linalg.vector_norm(side.u, dim=1).amax().item() for side in sides]
    terms = math.log(max(rows.shape[0], cols.shape[0]))
    return inv_tau * longest[0] * longest[-1] + terms < DIRECT_LIMIT[rows.dtype]


class BlockedBackend(ComposedBackend):
    def prepare(self, sides: Sequence[Side], inv_tau: float | Tensor) -> PreparedNegLse:
        blocks = [Blocks(side) for side in sides]
        if any(side.limits is not None for side in sides):
            return _ShiftedTiles(blocks, inv_tau)
        return (_DirectTiles if _stays_in_range(blocks, inv_tau) else _ShiftedTiles)(blocks, inv_tau)


BACKEND = BlockedBackend()
