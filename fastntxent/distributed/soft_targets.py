"""What a teacher expects of a student's similarities, over ranks: this rank's rows and columns against those of all.

Forward, columns travel with their teacher's rows and one number each, and what this rank's rows add to a column's sum
goes to the column's rank. Backward, each rank forms the gradient of its own rows and of its own columns: the other side
travels with its teacher's rows and two numbers each, and no gradient of an embedding does. Of a teacher that is called
no rows travel: each rank calls its own for its rows and its columns. ops/soft_targets.py has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import ops
from ..algebra import autocast_off
from ..ops.register import save
from ..ops.soft_targets import SoftTargets, called_targets, soft_targets
from ..sides import CalledTeacher, Side, Teacher
from . import wire
from .columns import Block, Columns
from .shard import Shard
from .wire import uncompiled

_Similarities: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class _Taught(NamedTuple):
    """A side of the pairs, its teacher's rows or the teacher that is called, and of each row the teacher's log-sum-exp
    and the weight of its sum."""

    u: Tensor
    ids: Tensor
    teacher: Tensor | _Similarities
    lse: Tensor
    weights: Tensor | None = None


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
        return _SoftDotsOverRanks.apply(rows.u, cols.u, *ids, teacher.similarities, *teacher, *columns)
    return _SoftDotsOverRanks.apply(rows.u, cols.u, *ids, *teacher, *columns)


class _SoftDotsOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        t_u: Tensor | _Similarities,
        t_v: Tensor | _Similarities,
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
                    others = _Taught(block.rows, block.ids, _teacher_of(block, t_v), block.numbers[-1])
                    tiles, _ = _tiles("soft_dots", _Taught(own, u_ids, t_u, rows_lse), others, inv_tau)
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
        rows = _Taught(of_u.own, u_ids, t_u, rows_lse, d_rows)
        cols = _Taught(of_v.own, v_ids, t_v, cols_lse, d_cols)
        d_u = d_v = None
        if ctx.needs_input_grad[0]:
            d_u = _gradient(rows, cols, of_v, inv_tau).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            d_v = _gradient(cols, rows, of_u, inv_tau, of_columns=True).to(ctx.dtypes[1])
        return d_u, d_v, *[None] * 9


def _gradient(
    own: _Taught, others: _Taught, columns: Columns, inv_tau: float | Tensor, *, of_columns: bool = False
) -> Tensor:
    """Gradient in this rank's rows against all ranks' columns, or in its columns against all ranks' rows: `columns`, of
    which `others` are this rank's. Tiles have the rows on their side either way, so that a logit is rounded as it was
    in the forward."""
    d_own = torch.zeros_like(own.u)
    assert others.weights is not None
    numbers = torch.stack((others.lse, others.weights), dim=1)
    with autocast_off(own.u):
        for block in columns.blocks(others.ids, *_sent(others.teacher), numbers):
            if len(own.u):
                lse, weights = block.numbers[-1].T.contiguous()
                there = _Taught(block.rows, block.ids, _teacher_of(block, others.teacher), lse, weights)
                sides = (there, own) if of_columns else (own, there)
                tiles, (of_rows, of_cols) = _tiles("soft_dots_backward", *sides, inv_tau)
                of_block = tiles.gradients((of_rows, of_cols), not of_columns, of_columns)[of_columns]
                assert of_block is not None
                d_own += of_block
    return d_own


def _sent(teacher: Tensor | _Similarities) -> tuple[Tensor, ...]:
    """The teacher's rows, if it has any, as what travels with a side."""
    return (teacher,) if isinstance(teacher, Tensor) else ()


def _teacher_of(block: Block, teacher: Tensor | _Similarities) -> Tensor | _Similarities:
    """The same of a block that has come with what was `_sent`."""
    return block.numbers[0] if isinstance(teacher, Tensor) else teacher


def _tiles(call: str, rows: _Taught, cols: _Taught, inv_tau: float | Tensor) -> tuple[SoftTargets, tuple[Any, ...]]:
    """The tiles of two sides, and the weights as they may be used."""
    weights = [side.weights for side in (rows, cols) if side.weights is not None]
    ids, numbers = (rows.ids, cols.ids), (inv_tau, rows.lse, cols.lse)
    if not isinstance(rows.teacher, Tensor):
        return called_targets(rows.u, cols.u, *ids, rows.teacher, *numbers), tuple(weights)
    return soft_targets(call, *weights, rows.u, cols.u, rows.teacher, cols.teacher, *ids, *numbers)
