"""Sums of softplus across ranks: this rank's rows against the columns of all ranks, and the gradient.

    sum_i = sum over {j : id_j != id_i} of log(1 + exp(x_ij))  [+ sum over {j : id_j = id_i} of log(1 + exp(-x_ij))]

x_ij = k u_i . v_j + b. In the forward, columns are sent. In the backward, each rank computes the gradients of its rows
and of its columns. For these gradients, each row and each column is sent with one number: the upstream gradient of the
row's sum, or 0 for a column that is not a row. No gradient of an embedding is sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import autocast_off
from ..backends.base import SumWeights
from ..ops.register import save
from ..ops.softplus import run_softplus
from ..sides import Side
from .columns import Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def softplus_sums(
    rows: Side,
    cols: Side | None,
    inv_tau: float | Tensor,
    bias: Tensor,
    shard: Shard,
    backend: str,
    *,
    positives: bool,
) -> Tensor:
    """Return the sums of this rank's rows (M,) against the columns of all ranks. If `cols` is None, the columns are the
    rows of all ranks.

    The backward returns the gradient of the sum of all ranks' losses with respect to the rows and columns, and this
    rank's parts of the gradients with respect to inv_tau and bias (0-d).
    """
    of_u = shard.columns(rows.u)
    if cols is None:
        of_v, v, v_ids = None, rows.u.detach(), rows.ids
    else:
        of_v, v, v_ids = shard.columns(cols.u), cols.u, cols.ids
    ids = rows.ids.to(torch.int64), v_ids.to(torch.int64)
    return _SoftplusOverRanks.apply(rows.u, v, *ids, inv_tau, bias, of_u, of_v, positives, backend)


class _SoftplusOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: float | Tensor,
        bias: Tensor,
        of_u: Columns,
        of_v: Columns | None,
        positives: bool,
        backend: str,
    ) -> Tensor:
        columns = of_u if of_v is None else of_v
        own = of_u.own
        sums = own.new_zeros(len(own))
        with autocast_off(u):
            for block in columns.blocks(u_ids if of_v is None else v_ids):
                if len(own):
                    sides = Side(own, u_ids), Side(block.rows, block.ids)
                    sums += run_softplus(*sides, inv_tau, bias, positives, None, backend).rows
        ctx.partitions = of_u.partition, columns.partition
        ctx.same, ctx.positives, ctx.backend, ctx.dtypes = of_v is None, positives, backend, (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, inv_tau, bias, *of_u.to_save(u_ids), *(() if of_v is None else of_v.to_save(v_ids)))
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, ...]:
        d_sums = d_sums.clone(memory_format=torch.contiguous_format)  # the gradient of a sum or a mean is expanded
        inv_tau, bias, *saved = ctx.part.begin_backward(ctx, d_sums.device)
        of_u, u_ids = ctx.partitions[0].columns_from(saved[:4])
        needs_u, needs_v, _, _, needs_inv_tau, needs_bias = ctx.needs_input_grad[:6]
        options = inv_tau, bias, ctx.positives, ctx.backend
        d_u = d_v = None
        numbers: tuple[Tensor, Tensor] | None = None
        if ctx.same:
            # A pair is computed twice, once for each of its rows, and each time with the weights of both rows.
            d_u, d_inv_tau, d_bias = _gradient_of_rows(Side(of_u.own, u_ids), d_sums, of_u, u_ids, d_sums, *options)
            numbers = d_inv_tau / 2, d_bias / 2
        else:
            of_v, v_ids = ctx.partitions[1].columns_from(saved[4:])
            none_of_v = d_sums.new_zeros(len(of_v.own))
            if needs_v:
                d_v, *of_numbers = _gradient_of_rows(Side(of_v.own, v_ids), none_of_v, of_u, u_ids, d_sums, *options)
                numbers = of_numbers[0], of_numbers[1]
            if needs_u or not needs_v:  # for inv_tau and bias one pass, which covers all pairs, is enough
                d_u, *of_numbers = _gradient_of_rows(Side(of_u.own, u_ids), d_sums, of_v, v_ids, none_of_v, *options)
                numbers = of_numbers[0], of_numbers[1]
        assert numbers is not None
        return (
            d_u.to(ctx.dtypes[0]) if needs_u and d_u is not None else None,
            d_v.to(ctx.dtypes[1]) if d_v is not None else None,
            None,
            None,
            numbers[0] if needs_inv_tau else None,
            numbers[1] if needs_bias else None,
            *[None] * 4,
        )


def _gradient_of_rows(
    rows: Side,
    of_rows: Tensor,
    columns: Columns,
    column_ids: Tensor,
    of_columns: Tensor,
    inv_tau: float | Tensor,
    bias: Tensor,
    positives: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient with respect to this rank's rows, and the gradients with respect to inv_tau and bias over all
    pairs of these rows with the columns of all ranks. `of_columns` are the upstream gradients of the sums of this
    rank's columns."""
    d_rows, d_inv_tau, d_bias = torch.zeros_like(rows.u), of_rows.new_zeros(()), of_rows.new_zeros(())
    with autocast_off(rows.u):
        for block in columns.blocks(column_ids, of_columns):
            if len(rows.u):
                weights = SumWeights(of_rows, block.numbers[0], wants_cols=False)
                sides = rows, Side(block.rows, block.ids)
                found = run_softplus(*sides, inv_tau, bias, positives, weights, backend)
                assert found.d_rows is not None
                assert found.d_inv_tau is not None
                assert found.d_bias is not None
                d_rows += found.d_rows
                d_inv_tau, d_bias = d_inv_tau + found.d_inv_tau, d_bias + found.d_bias
    return d_rows, d_inv_tau, d_bias
