"""Sums over positive pairs that lie on several ranks: this rank's rows, and the rows of the same id on all of them.

    f_i = log sum_j exp(l_ij)   or   sum_j log(1 + exp(nu_i - l_ij)),     l_ij = k u_i . u_j

A pair is in f of both its rows. With w_i = d loss / d f_i, and D_ij what of it reaches l_ij,

    D_ij = w_i exp(l_ij - f_i)   or   -w_i sigmoid(nu_i - l_ij)      d/du_i = k sum_j (D_ij + D_ji) u_j

Two numbers a row travel in the backward, w_j with f_j or nu_j, and no gradient. Pairs are those of ops/positives.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.positives import Pairs, Tile, through_lse, through_sum, with_positives
from ..ops.register import autocast_off
from .columns import Block, Columns
from .shard import Shard
from .wire import eager


@eager
def positive_lse(u: Tensor, ids: Tensor, inv_tau: Tensor, shard: Shard) -> Tensor:
    """Log-sum-exps of this rank's rows (M,), -inf for one without a positive; differentiable in u and inv_tau (0-d).

    The gradient in u is that of the sum of the ranks' losses; that in inv_tau is this rank's part of it.
    """
    return _PositiveLse.apply(u, ids.to(torch.int64), inv_tau, shard.columns(u))


@eager
def positive_sum(u: Tensor, ids: Tensor, inv_tau: Tensor, nu: Tensor, shard: Shard) -> Tensor:
    """The other f of the header (M,), differentiable in u, inv_tau and nu, as `positive_lse`."""
    return _PositiveSum.apply(u, ids.to(torch.int64), inv_tau, nu, shard.columns(u))


class _PositiveLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: Tensor, columns: Columns) -> Tensor:
        own = columns.own
        lse = own.new_full((len(own),), -torch.inf)
        with autocast_off(own):
            for block in columns.blocks(ids):
                if len(own):
                    lse = torch.logaddexp(lse, _pairs(own, ids, inv_tau, columns, block).lse())
        ctx.layout, ctx.dtype = columns.layout, u.dtype
        ctx.part = columns.layout.turn.part()
        ctx.save_for_backward(inv_tau, lse, *columns.save(ids))
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, lse, *saved = ctx.part.begin_backward(ctx, d_lse.device)
        weights = with_positives(d_lse, lse)
        columns, ids = ctx.layout.restore(saved)
        d_u, d_inv_tau, _ = _backward(columns, ids, inv_tau, weights, lse, through_lse)
        return d_u.to(ctx.dtype), None, d_inv_tau, None


class _PositiveSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: Tensor, nu: Tensor, columns: Columns) -> Tensor:
        own = columns.own
        sums = own.new_zeros(len(own))
        with autocast_off(own):
            for block in columns.blocks(ids):
                if len(own):
                    sums += _pairs(own, ids, inv_tau, columns, block).sum(nu)
        ctx.layout, ctx.dtype = columns.layout, u.dtype
        ctx.part = columns.layout.turn.part()
        ctx.save_for_backward(inv_tau, nu, *columns.save(ids))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, nu, *saved = ctx.part.begin_backward(ctx, d_sum.device)
        columns, ids = ctx.layout.restore(saved)
        d_u, d_inv_tau, of_rows = _backward(columns, ids, inv_tau, d_sum, nu, through_sum)
        return d_u.to(ctx.dtype), None, d_inv_tau, -of_rows, None


def _pairs(own: Tensor, ids: Tensor, inv_tau: Tensor, columns: Columns, block: Block) -> Pairs:
    return Pairs(own, block.rows, ids, block.ids, inv_tau, own=columns.layout.span.start - block.span.start)


def _backward(
    columns: Columns,
    ids: Tensor,
    inv_tau: Tensor,
    d_f: Tensor,
    inner: Tensor,
    through: Callable[[Tile, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient in this rank's rows, this rank's part of that in inv_tau, and sum_j D_ij of each row. `inner`: f or nu,
    which D_ij compares a logit with."""
    own, numbers = columns.own, torch.stack((d_f, inner), dim=1)
    d_u, d_inv_tau, of_rows = torch.zeros_like(own), own.new_zeros(()), torch.zeros_like(d_f)
    with autocast_off(own):
        for block in columns.blocks(ids, numbers):
            if len(own):
                pairs = _pairs(own, ids, inv_tau, columns, block)
                d_u_part, d_inv_tau_part, of_rows_part = _of_block(pairs, numbers, block.numbers[0], through)
                d_u += d_u_part
                d_inv_tau = d_inv_tau + d_inv_tau_part
                of_rows += of_rows_part
    return d_u, (d_inv_tau / 2).to(inv_tau.device), of_rows  # a pair is on the rank of either of its rows


def _of_block(
    pairs: Pairs, of_rows: Tensor, of_cols: Tensor, through: Callable[[Tile, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the pairs of one block, whose numbers are `of_cols`, and this rank's `of_rows`."""
    rows, cols = of_rows[pairs.row_order].T[:, :, None], of_cols[pairs.col_order].T[:, None]
    sums = of_rows.new_zeros(len(of_rows))

    def d_logits(tile: Tile) -> Tensor:
        d = through(tile, *rows[:, tile.rows])
        sums[tile.rows] += d.sum(dim=1)
        return d.add_(through(tile, *cols[:, :, tile.cols]))

    d_u, _, d_inv_tau = pairs.backward(d_logits, needs_v=False)
    return d_u, d_inv_tau, pairs.of_rows(sums)
