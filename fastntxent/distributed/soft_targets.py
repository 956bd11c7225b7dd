"""What a teacher expects of a student's similarities, over ranks: this rank's rows and columns against those of all.

Forward, columns travel with their teacher's rows and one number each, and what this rank's rows add to a column's sum
goes to the column's rank. Backward, each rank forms the gradient of its own rows and of its own columns: the other side
travels with its teacher's rows and two numbers each, and no gradient of an embedding does. Of a teacher that is called
no rows travel: each rank calls its own for its rows and its columns. ops/soft_targets.py has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops.register import autocast_off, save
from ..ops.soft_targets import SoftTargets, called_targets, soft_targets
from ..sides import CalledTeacher, Side, Teacher
from . import wire
from .columns import Block, Columns
from .shard import Shard
from .wire import uncompiled

_Similarities: TypeAlias = Callable[[Tensor, Tensor], Tensor]
_OfSide: TypeAlias = (
    "Tensor | _Similarities"  # a side's rows for the teacher, or the teacher with that side as its rows
)


@uncompiled
def called_neg_lse(
    similarities: _Similarities, inv_tau: float | Tensor, ids: Tensor, dtype: torch.dtype, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a teacher that is called nu of this rank's rows over all ranks' columns, nu of its columns over all ranks'
    rows, and the logits of its pairs, (m,) each. ids: of its samples. If a rank's teacher raises, every rank raises."""
    all_ids, failure = torch.arange(shard.n_samples, device=ids.device), None
    nu_rows = pos = torch.empty(len(ids), dtype=dtype, device=ids.device)
    of_all = torch.full((len(all_ids),), -torch.inf, dtype=dtype, device=ids.device)
    if len(ids):
        try:
            nu_rows, of_all, pos = ops.called_neg_lse(ids, all_ids, similarities, inv_tau, dtype)
        except Exception as error:
            failure = error
    shard.turn.end_calls_of_teacher(failure is not None, ids.device)
    if failure is not None:
        raise failure
    nu_cols = wire.exchange_numbers(shard.group, of_all, shard.samples).logsumexp(dim=0)
    return nu_rows, nu_cols, pos


@uncompiled
def soft_dots(rows: Side, cols: Side, teacher: Teacher | CalledTeacher, shard: Shard) -> tuple[Tensor, Tensor]:
    """The sums of this rank's rows (M,) over all ranks' columns, and of this rank's columns (K,) over all ranks' rows.

    Differentiable in the student's rows and columns, as of the sum of the ranks' losses.
    """
    ids = rows.ids.to(torch.int64), cols.ids.to(torch.int64)
    columns = shard.columns(rows.u), shard.columns(cols.u)
    if isinstance(teacher, CalledTeacher):
        similarities, *numbers = teacher
        return _SoftDotsOverRanks.apply(
            rows.u, cols.u, *ids, similarities, lambda cols, rows: similarities(rows, cols).T, *numbers, *columns
        )
    return _SoftDotsOverRanks.apply(rows.u, cols.u, *ids, *teacher, *columns)


class _SoftDotsOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        t_u: _OfSide,
        t_v: _OfSide,
        inv_tau: float | Tensor,
        rows_lse: Tensor,
        cols_lse: Tensor,
        of_u: Columns,
        of_v: Columns,
    ) -> tuple[Tensor, Tensor]:
        own = of_u.own
        rows, of_all = (own.new_zeros(n) for n in (len(own), of_v.partition.n_rows))
        with autocast_off(u):
            for block in of_v.blocks(v_ids, *_sent(t_v), cols_lse):
                if len(own):
                    numbers = inv_tau, rows_lse, block.numbers[-1]
                    tiles, _ = _tiles("soft_dots", (), Side(own, u_ids), block, t_u, *numbers)
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
    of_rows: tuple[Tensor, _OfSide, Tensor],
    columns: Columns,
    column_ids: Tensor,
    of_columns: tuple[Tensor, _OfSide, Tensor],
    inv_tau: float | Tensor,
) -> Tensor:
    """Gradient in the rows. `of_rows`, `of_columns`: the weights of their sums, their teacher and log-sum-exps, both of
    this rank."""
    d_sums, teacher, lse = of_rows
    d_columns, of_teacher, columns_lse = of_columns
    d_rows = torch.zeros_like(rows.u)
    with autocast_off(rows.u):
        for block in columns.blocks(column_ids, *_sent(of_teacher), torch.stack((d_columns, columns_lse), dim=1)):
            if len(rows.u):
                d_block, block_lse = block.numbers[-1].T.contiguous()
                numbers = inv_tau, lse, block_lse
                tiles, weights = _tiles("soft_dots_backward", (d_sums, d_block), rows, block, teacher, *numbers)
                of_block, _ = tiles.gradients((weights[0], weights[1]), True, False)
                assert of_block is not None
                d_rows += of_block
    return d_rows


def _sent(of_side: _OfSide) -> tuple[Tensor, ...]:
    """The teacher's rows of a side, if there are any, as what travels with the side."""
    return (of_side,) if isinstance(of_side, Tensor) else ()


def _tiles(
    call: str,
    weights: tuple[Tensor, ...],
    rows: Side,
    block: Block,
    of_rows: _OfSide,
    inv_tau: float | Tensor,
    rows_lse: Tensor,
    block_lse: Tensor,
) -> tuple[SoftTargets, tuple[Any, ...]]:
    """The tiles of rows here and columns of a block, and the weights as they may be used."""
    numbers = inv_tau, rows_lse, block_lse
    if isinstance(of_rows, Tensor):
        sides = rows.u, block.rows, of_rows, block.numbers[0], rows.ids, block.ids
        return soft_targets(call, *weights, *sides, *numbers)
    return called_targets(rows.u, block.rows, rows.ids, block.ids, of_rows, *numbers), weights
