"""Sums over positive pairs across ranks: this rank's rows with the rows of the same id on all ranks.

    f_i = log sum_j exp(l_ij)   or   sum_j log(1 + exp(nu_i - l_ij)),     l_ij = k u_i . u_j

A pair contributes to f of both of its rows. Let w_i = d loss / d f_i, and D_ij the gradient that reaches l_ij through
f_i. Then

    D_ij = w_i exp(l_ij - f_i)   or   -w_i sigmoid(nu_i - l_ij)      d/du_i = k sum_j (D_ij + D_ji) u_j

In `positive_lse_to`, columns v_j take the place of u_j, and a pair contributes only to f of its row. In the backward,
each row is sent with two numbers: w_j, and f_j or nu_j. No gradient is sent. ops/positives.py has the tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import autocast_off
from ..ops.positives import PositiveTile, PositiveTiles, through_lse, through_sum, zero_without_positive
from ..ops.register import save
from ..sides import Side
from .columns import Block, Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def positive_lse(u: Tensor, ids: Tensor, inv_tau: float | Tensor, shard: Shard) -> Tensor:
    """Return the log-sum-exps f (M,) of this rank's rows, -inf for rows without a positive. Differentiable in u and
    inv_tau (0-d).

    The backward returns the gradient of the sum of all ranks' losses with respect to u, and this rank's part of the
    gradient with respect to inv_tau.
    """
    return _PositiveLse.apply(u, ids.to(torch.int64), inv_tau, shard.columns(u))


@uncompiled
def positive_lse_to(rows: Side, cols: Side, inv_tau: float | Tensor, shard: Shard) -> Tensor:
    """Like `positive_lse`, between this rank's rows and the columns with the same id on all ranks. Differentiable in
    the columns too."""
    ids = rows.ids.to(torch.int64), cols.ids.to(torch.int64)
    columns = shard.columns(rows.u), shard.columns(cols.u)
    return _CrossPositiveLse.apply(rows.u, cols.u, *ids, inv_tau, *columns)


@uncompiled
def positive_sum(u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor, shard: Shard) -> Tensor:
    """Return the second f defined above (M,). Differentiable in u, inv_tau and nu, like `positive_lse`."""
    return _PositiveSum.apply(u, ids.to(torch.int64), inv_tau, nu, shard.columns(u))


class _PositiveLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: float | Tensor, columns: Columns) -> Tensor:
        own = columns.own
        lse = own.new_full((len(own),), -torch.inf)
        with autocast_off(own):
            for block in columns.blocks(ids):
                if len(own):
                    lse = torch.logaddexp(lse, _tiles_of(own, ids, inv_tau, columns, block).lse())
        ctx.partition, ctx.dtype = columns.partition, u.dtype
        ctx.part = columns.partition.turn.part()
        save(ctx, inv_tau, lse, *columns.to_save(ids))
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, lse, *saved = ctx.part.begin_backward(ctx, d_lse.device)
        weights = zero_without_positive(d_lse, lse)
        columns, ids = ctx.partition.columns_from(saved)
        d_u, d_inv_tau, _ = _gradient_of_pairs(columns, ids, inv_tau, weights, lse, through_lse)
        return d_u.to(ctx.dtype), None, d_inv_tau if ctx.needs_input_grad[2] else None, None


class _CrossPositiveLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: float | Tensor,
        of_u: Columns,
        of_v: Columns,
    ) -> Tensor:
        own = of_u.own
        lse = own.new_full((len(own),), -torch.inf)
        with autocast_off(own):
            for block in of_v.blocks(v_ids):
                if len(own):
                    tiles = PositiveTiles(own, block.rows, u_ids, block.ids, inv_tau, own=None)
                    lse = torch.logaddexp(lse, tiles.lse())
        ctx.partitions, ctx.dtypes = (of_u.partition, of_v.partition), (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, inv_tau, lse, *of_u.to_save(u_ids), *of_v.to_save(v_ids))
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, lse, *saved = ctx.part.begin_backward(ctx, d_lse.device)
        of_u, u_ids = ctx.partitions[0].columns_from(saved[:4])
        of_v, v_ids = ctx.partitions[1].columns_from(saved[4:])
        needs_u, needs_v, _, _, needs_inv_tau = ctx.needs_input_grad[:5]
        numbers = torch.stack((zero_without_positive(d_lse, lse), lse), dim=1)
        d_u, d_v = torch.zeros_like(of_u.own), torch.zeros_like(of_v.own)
        of_inv_tau = d_lse.new_zeros(())
        with autocast_off(d_u):
            if needs_v:
                for block in of_u.blocks(u_ids, numbers):
                    if len(d_v):
                        tiles = PositiveTiles(of_v.own, block.rows, v_ids, block.ids, inv_tau, own=None)
                        part, of_block = _through_lse_of_columns(tiles, block.numbers[0])
                        d_v += part
                        of_inv_tau = of_inv_tau + of_block
            if needs_u or not needs_v:  # for inv_tau one pass is enough: across ranks, it covers all pairs
                of_inv_tau = d_lse.new_zeros(())
                for block in of_v.blocks(v_ids):
                    if len(d_u):
                        tiles = PositiveTiles(of_u.own, block.rows, u_ids, block.ids, inv_tau, own=None)
                        part, of_block = _through_lse_of_rows(tiles, numbers)
                        d_u += part
                        of_inv_tau = of_inv_tau + of_block
        return (
            d_u.to(ctx.dtypes[0]) if needs_u else None,
            d_v.to(ctx.dtypes[1]) if needs_v else None,
            None,
            None,
            of_inv_tau if needs_inv_tau else None,
            None,
            None,
        )


def _through_lse_of_rows(tiles: PositiveTiles, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to this rank's rows and inv_tau, through the log-sum-exps of the rows."""
    rows = tiles.by_row(numbers).T[:, :, None]
    d_u, _, d_inv_tau = tiles.backward(lambda tile: through_lse(tile, *rows[:, tile.rows]), needs_v=False)
    return d_u, d_inv_tau


def _through_lse_of_columns(tiles: PositiveTiles, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the rows of `tiles` and inv_tau, through the log-sum-exps of the columns."""
    cols = tiles.by_column(numbers).T[:, None]
    d_u, _, d_inv_tau = tiles.backward(lambda tile: through_lse(tile, *cols[:, :, tile.cols]), needs_v=False)
    return d_u, d_inv_tau


class _PositiveSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor, columns: Columns) -> Tensor:
        own = columns.own
        sums = own.new_zeros(len(own))
        with autocast_off(own):
            for block in columns.blocks(ids):
                if len(own):
                    sums += _tiles_of(own, ids, inv_tau, columns, block).sum(nu)
        ctx.partition, ctx.dtype = columns.partition, u.dtype
        ctx.part = columns.partition.turn.part()
        save(ctx, inv_tau, nu, *columns.to_save(ids))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, nu, *saved = ctx.part.begin_backward(ctx, d_sum.device)
        columns, ids = ctx.partition.columns_from(saved)
        d_u, d_inv_tau, of_rows = _gradient_of_pairs(columns, ids, inv_tau, d_sum, nu, through_sum)
        return d_u.to(ctx.dtype), None, d_inv_tau if ctx.needs_input_grad[2] else None, -of_rows, None


def _tiles_of(own: Tensor, ids: Tensor, inv_tau: float | Tensor, columns: Columns, block: Block) -> PositiveTiles:
    return PositiveTiles(own, block.rows, ids, block.ids, inv_tau, own=columns.partition.span.start - block.span.start)


def _gradient_of_pairs(
    columns: Columns,
    ids: Tensor,
    inv_tau: float | Tensor,
    d_f: Tensor,
    inner: Tensor,
    through: Callable[[PositiveTile, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient with respect to this rank's rows, this rank's part of the gradient with respect to inv_tau,
    and sum_j D_ij for each row. `inner` is the f or nu in the formula of D_ij."""
    own, numbers = columns.own, torch.stack((d_f, inner), dim=1)
    d_u, d_inv_tau, of_rows = torch.zeros_like(own), own.new_zeros(()), torch.zeros_like(d_f)
    with autocast_off(own):
        for block in columns.blocks(ids, numbers):
            if len(own):
                tiles = _tiles_of(own, ids, inv_tau, columns, block)
                d_u_part, d_inv_tau_part, of_rows_part = _of_block(tiles, numbers, block.numbers[0], through)
                d_u += d_u_part
                d_inv_tau = d_inv_tau + d_inv_tau_part
                of_rows += of_rows_part
    return d_u, d_inv_tau / 2, of_rows  # halved: a pair was counted for both of its rows


def _of_block(
    tiles: PositiveTiles, of_rows: Tensor, of_cols: Tensor, through: Callable[[PositiveTile, Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `_gradient_of_pairs`, for the tiles of one block, except that the gradient with respect to inv_tau is not
    halved. `of_rows` and `of_cols` are the numbers (d_f, inner) of the rows and columns of the tiles."""
    rows, cols = tiles.by_row(of_rows).T[:, :, None], tiles.by_column(of_cols).T[:, None]
    sums = of_rows.new_zeros(len(of_rows))

    def d_logits(tile: PositiveTile) -> Tensor:
        d = through(tile, *rows[:, tile.rows])
        sums[tile.rows] += d.sum(dim=1)
        return d.add_(through(tile, *cols[:, :, tile.cols]))

    d_u, _, d_inv_tau = tiles.backward(d_logits, needs_v=False)
    return d_u, d_inv_tau, tiles.of_rows(sums)
