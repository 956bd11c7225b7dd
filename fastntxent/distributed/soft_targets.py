"""The expectation of a student's similarities under a teacher's softmax, across ranks: this rank's rows and columns
against the columns and rows of all ranks.

In the forward, each column is sent with its teacher embedding and one number, the teacher's log-sum-exp. The partial
sums of a column are sent to the rank that holds the column. In the backward, each rank computes the gradients of its
rows and of its columns. For these gradients, each row and each column is sent with its teacher embedding and two
numbers, the log-sum-exp and the upstream gradient. No gradient of an embedding is sent. If the teacher is a function,
no teacher embedding is sent: each rank calls the function for its rows and its columns. ops/soft_targets.py has the
formulas.
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
    """One side of the pairs: the student's rows and their ids, the teacher's rows or function, and for each row the
    teacher's log-sum-exp and the weight of the row's sum, which is its upstream gradient."""

    u: Tensor
    ids: Tensor
    teacher: Tensor | _Similarities
    lse: Tensor
    weights: Tensor | None = None


@uncompiled
def called_neg_lse(
    similarities: _Similarities, inv_tau: float | Tensor, ids: Tensor, dtype: torch.dtype, shard: Shard
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors (m,) for a teacher that is a function: nu of this rank's rows over all ranks' columns, nu of
    this rank's columns over all ranks' rows, and the logits of this rank's positive pairs. `ids` are this rank's sample
    ids. If the teacher raises on one rank, every rank raises, provided that calls are checked."""
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
    """Return the sums of this rank's rows (M,) over all ranks' columns, and of this rank's columns (K,) over all ranks'
    rows.

    Differentiable in the student's rows and columns; the backward returns the gradient of the sum of all ranks' losses.
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
    """Return the gradient with respect to `own`: this rank's rows or, with `of_columns`, this rank's columns. `others`
    is the other side on this rank, and `columns` the other side on all ranks. Tiles are never transposed: with
    `of_columns` too, a tile's rows are rows and its columns are columns. So logits are rounded as in the forward."""
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
    """Return the teacher's rows, which are sent with a side, or nothing if the teacher is a function."""
    return (teacher,) if isinstance(teacher, Tensor) else ()


def _teacher_of(block: Block, teacher: Tensor | _Similarities) -> Tensor | _Similarities:
    """Return the teacher's rows of a received block, or the function if the teacher is one."""
    return block.numbers[0] if isinstance(teacher, Tensor) else teacher


def _tiles(call: str, rows: _Taught, cols: _Taught, inv_tau: float | Tensor) -> tuple[SoftTargets, tuple[Any, ...]]:
    """Return the tiles of two sides, and the sides' weights (none in the forward). Tensors are checked, unless the
    teacher is a function."""
    weights = [side.weights for side in (rows, cols) if side.weights is not None]
    ids, numbers = (rows.ids, cols.ids), (inv_tau, rows.lse, cols.lse)
    if not isinstance(rows.teacher, Tensor):
        return called_targets(rows.u, cols.u, *ids, rows.teacher, *numbers), tuple(weights)
    return soft_targets(call, *weights, rows.u, cols.u, rows.teacher, cols.teacher, *ids, *numbers)
