"""What a teacher expects of a student's similarities, over ranks: this rank's rows and columns against those of all.

Forward, columns travel with their teacher's rows and one number each, and what this rank's rows add to a column's sum
goes to the column's rank. Backward, each rank forms the gradient of its own rows and of its own columns: the other side
travels with its teacher's rows and two numbers each, and no gradient of an embedding does. ops/soft_targets.py has the
formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.register import autocast_off, save
from ..ops.soft_targets import soft_targets
from ..sides import Side, Teacher
from .columns import Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def soft_dots(rows: Side, cols: Side, teacher: Teacher, shard: Shard) -> tuple[Tensor, Tensor]:
    """The sums of this rank's rows (M,) over all ranks' columns, and of this rank's columns (K,) over all ranks' rows.

    Differentiable in the student's rows and columns, as of the sum of the ranks' losses.
    """
    ids = rows.ids.to(torch.int64), cols.ids.to(torch.int64)
    columns = shard.columns(rows.u), shard.columns(cols.u)
    return _SoftDotsOverRanks.apply(rows.u, cols.u, *ids, *teacher, *columns)


class _SoftDotsOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        t_u: Tensor,
        t_v: Tensor,
        inv_tau: float | Tensor,
        rows_lse: Tensor,
        cols_lse: Tensor,
        of_u: Columns,
        of_v: Columns,
    ) -> tuple[Tensor, Tensor]:
        own = of_u.own
        rows, of_all = (own.new_zeros(n) for n in (len(own), of_v.partition.n_rows))
        with autocast_off(u):
            for block in of_v.blocks(v_ids, t_v, cols_lse):
                if len(own):
                    block_t, block_lse = block.numbers
                    teacher = t_u, block_t, u_ids, block.ids, inv_tau, rows_lse, block_lse
                    tiles, _ = soft_targets("soft_dots", own, block.rows, *teacher)
                    of_own, of_all[block.span] = tiles.sums()
                    rows += of_own
        cols = of_v.partition.exchange(of_all).sum(dim=0)
        ctx.partitions, ctx.dtypes = (of_u.partition, of_v.partition), (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, inv_tau, t_u, t_v, rows_lse, cols_lse, *of_u.to_save(u_ids), *of_v.to_save(v_ids))
        return rows, cols

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, t_u, t_v, rows_lse, cols_lse, *saved = ctx.part.begin_backward(ctx, d_rows.device)
        of_u, u_ids = ctx.partitions[0].columns_from(saved[:4])
        of_v, v_ids = ctx.partitions[1].columns_from(saved[4:])
        of_rows, of_cols = (d_rows, t_u, rows_lse), (d_cols, t_v, cols_lse)
        d_u = d_v = None
        if ctx.needs_input_grad[0]:
            d_u = _gradient_of_rows(Side(of_u.own, u_ids), of_rows, of_v, v_ids, of_cols, inv_tau).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            d_v = _gradient_of_rows(Side(of_v.own, v_ids), of_cols, of_u, u_ids, of_rows, inv_tau).to(ctx.dtypes[1])
        return d_u, d_v, *[None] * 9


def _gradient_of_rows(
    rows: Side,
    of_rows: tuple[Tensor, Tensor, Tensor],
    columns: Columns,
    column_ids: Tensor,
    of_columns: tuple[Tensor, Tensor, Tensor],
    inv_tau: float | Tensor,
) -> Tensor:
    """Gradient in the rows. `of_rows`, `of_columns`: the weights of their sums, their teacher's rows and log-sum-exps,
    both of this rank."""
    d_sums, teacher, lse = of_rows
    d_columns, of_teacher, columns_lse = of_columns
    d_rows = torch.zeros_like(rows.u)
    with autocast_off(rows.u):
        for block in columns.blocks(column_ids, of_teacher, torch.stack((d_columns, columns_lse), dim=1)):
            if len(rows.u):
                block_t, numbers = block.numbers
                d_block, block_lse = numbers.T.contiguous()
                given = teacher, block_t, rows.ids, block.ids, inv_tau, lse, block_lse
                tiles, weights = soft_targets("soft_dots_backward", d_sums, d_block, rows.u, block.rows, *given)
                of_block, _ = tiles.gradients((weights[0], weights[1]), True, False)
                assert of_block is not None
                d_rows += of_block
    return d_rows
