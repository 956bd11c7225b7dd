"""Sums of softplus over pairs, the core of sigmoid losses, for backends that have no kernels for such losses.

    x_ij = k u_i . v_j + b
    sum_i = sum over {j : id_j != id_i} of log(1 + exp(x_ij))  [+ sum over {j : id_j = id_i} of log(1 + exp(-x_ij))]

The term in brackets is for calls with `positives`. The gradient does not depend on a row's sum, so one pass over the
tiles computes values and gradients. Let a_i be the weights of the rows' sums, c_j the weights of the columns' sums, and
y_ij = 1 if the groups of i and j differ, else -1:

    G_ij = (a_i + c_j) y_ij sigmoid(y_ij x_ij)      d/du_i = k sum_j G_ij v_j      d/db = sum_ij G_ij

Without `positives`, G_ij is 0 within a group. With one side, v is u and c is a, and d/db is half of sum_ij G_ij. With
two sides, the pass costs 3u flops (u for the logits, 2u for the gradients), with u = 2 M K D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import loss_weight, row_dots, row_losses
from ..sides import Side
from .base import KernelBackend, PairSums, SumWeights
from .rows import UnitRows
from .tiling import Blocks, Tiles, TileValues


class TiledSoftplus(KernelBackend):
    """Sigmoid losses in tiles of plain PyTorch, for `blocked` and `cuda`."""

    def softplus(
        self,
        rows: Side,
        cols: Side | None,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        positives: bool,
        weights: SumWeights | None = None,
    ) -> PairSums:
        sides = [Blocks(rows)] if cols is None else [Blocks(rows), Blocks(cols)]
        tiles = _SoftplusTiles(sides, inv_tau, bias, positives)
        return tiles.values_alone() if weights is None else tiles.with_gradients(weights)

    def sigmoid_scalar(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        normalize: bool,
        two_views: bool,
        mean: bool,
        needs_i: bool,
        needs_j: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        weight = sigmoid_weight(z_i, two_views, mean)
        if not two_views:
            rows, cols = UnitRows(z_i, normalize), UnitRows(z_j, normalize)
            ids = torch.arange(z_i.shape[0], device=z_i.device)
            w = rows.u.new_full((len(z_i),), weight)
            weights = SumWeights(w, torch.zeros_like(w), needs_i, needs_j)
            found = self.softplus(Side(rows.u, ids), Side(cols.u, ids), inv_tau, bias, True, weights)
            assert found.d_inv_tau is not None
            assert found.d_bias is not None
            return (
                (found.rows * w).sum(),
                None if found.d_rows is None else rows.backward(found.d_rows),
                None if found.d_cols is None else cols.backward(found.d_cols),
                found.d_inv_tau,
                found.d_bias,
            )
        views = UnitRows(torch.cat((z_i, z_j)), normalize)
        w = views.u.new_full((len(views.u),), weight)
        found = self.softplus(_samples(views.u), None, inv_tau, bias, False, SumWeights(w, w, True, False))
        assert found.d_rows is not None
        assert found.d_inv_tau is not None
        assert found.d_bias is not None
        u_i, u_j = views.u.chunk(2)
        sims = row_dots(u_i, u_j)
        x = inv_tau * sims + bias
        d_x = -2 * weight * torch.sigmoid(-x)  # a pair counts in the losses of both its rows
        d_u = found.d_rows.addcmul_(torch.cat((u_j, u_i)), (inv_tau * d_x).repeat(2).unsqueeze(1))
        d_i, d_j = views.backward(d_u).chunk(2)
        loss = weight * found.rows.sum() + 2 * weight * row_losses(torch.zeros_like(x), x).sum()
        return loss, d_i.clone(), d_j.clone(), found.d_inv_tau + torch.dot(d_x, sims), found.d_bias + d_x.sum()

    def sigmoid_value(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        bias: float | Tensor,
        normalize: bool,
        two_views: bool,
        mean: bool,
    ) -> Tensor:
        weight = sigmoid_weight(z_i, two_views, mean)
        u, v = UnitRows(z_i, normalize).u, UnitRows(z_j, normalize).u
        if not two_views:
            ids = torch.arange(z_i.shape[0], device=z_i.device)
            return weight * self.softplus(Side(u, ids), Side(v, ids), inv_tau, bias, True).rows.sum()
        sums = self.softplus(_samples(torch.cat((u, v))), None, inv_tau, bias, False).rows
        x = inv_tau * row_dots(u, v) + bias
        return weight * sums.sum() + 2 * weight * row_losses(torch.zeros_like(x), x).sum()


def sigmoid_weight(z_i: Tensor, two_views: bool, mean: bool) -> float:
    """Return the weight of a row's loss: 1 for a sum; for a mean, 1/(2N) with two views or 1/N with two towers."""
    return loss_weight(z_i, mean) if two_views else 1 / z_i.shape[0] if mean else 1.0


def _samples(u: Tensor) -> Side:
    """Return the rows [u_i; u_j] of two views with their sample indices as ids."""
    return Side(u, torch.arange(u.shape[0] // 2, device=u.device).repeat(2))


class _SoftplusTiles(Tiles):
    def __init__(self, sides: Sequence[Blocks], inv_tau: float | Tensor, bias: float | Tensor, positives: bool):
        super().__init__(sides, inv_tau)
        self.bias, self.positives = bias, positives
        self.sums = self.rows.u.new_zeros(self.rows.u.shape[0])

    def values_alone(self) -> PairSums:
        for tile, mixed in self.logits():
            self._x_of(tile, mixed)
        return PairSums(self.sums)

    def with_gradients(self, weights: SumWeights) -> PairSums:
        one_side = len(self.sides) == 1
        of_rows, of_cols = weights.of_rows, weights.of_rows if one_side else weights.of_cols
        d_rows = torch.zeros_like(self.rows.u)
        d_cols = d_rows if one_side else torch.zeros_like(self.cols.u) if weights.wants_cols else None
        d_bias = d_rows.new_zeros(())
        for tile, mixed in self.logits():
            x, agree = self._x_of(tile, mixed)
            g = torch.sigmoid(x).mul_(of_rows[tile.rows, None] + of_cols[tile.cols])
            if agree is not None:
                g = torch.where(agree, -g if self.positives else 0, g)
            d_rows[tile.rows].addmm_(g, self.cols.u[tile.cols])
            if d_cols is not None and not tile.diagonal:
                d_cols[tile.cols].addmm_(g.T, self.rows.u[tile.rows])
            d_bias = d_bias + (g.sum() / 2 if tile.diagonal else g.sum())  # a diagonal tile contains each pair twice
        d_inv_tau = row_dots(self.rows.u, d_rows).sum() / (2 if one_side else 1)
        d_rows.mul_(self.inv_tau)
        if d_cols is not None and not one_side:
            d_cols.mul_(self.inv_tau)
        return PairSums(
            self.sums,
            d_rows if weights.wants_rows else None,
            None if one_side else d_cols,
            d_inv_tau,
            d_bias,
        )

    def _x_of(self, tile: TileValues, mixed: bool) -> tuple[Tensor, Tensor | None]:
        """Add a tile to the sums. Return x, negated within groups if `positives`, and the same-group mask or None."""
        x = tile.values.add_(self.bias)
        agree = self.agree(tile) if mixed else None
        if agree is not None and self.positives:
            x = torch.where(agree, -x, x)
        values = -F.logsigmoid(-x)
        if agree is not None and not self.positives:
            values.masked_fill_(agree, 0)
        self.sums[tile.rows] += values.sum(dim=1)
        if len(self.sides) == 1 and not tile.diagonal:
            self.sums[tile.cols] += values.sum(dim=0)
        return x, agree
