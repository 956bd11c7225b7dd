"""The primitive across ranks: log-sum-exps of this rank's rows against the columns of all ranks, and the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import autocast_off
from ..backends.base import Upstream
from ..ops.kernels import run_cross_neg_lse, run_cross_neg_lse_backward, run_neg_lse, run_neg_lse_backward
from ..ops.register import save
from ..sides import Side
from .columns import Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def neg_lse(u: Tensor, ids: Tensor, inv_tau: float | Tensor, shard: Shard, backend: str) -> Tensor:
    """Return nu of this rank's rows (M,) against the rows of all ranks. Differentiable in u and inv_tau (0-d).

    The backward returns the gradient of the sum of all ranks' losses with respect to u, and this rank's part of the
    gradient with respect to inv_tau.
    """
    return _NegLseOverRanks.apply(u, ids.to(torch.int64), inv_tau, shard.columns(u), backend)


@uncompiled
def cross_neg_lse(
    rows: Side,
    cols: Side,
    inv_tau: float | Tensor,
    of_rows: Shard,
    of_cols: Shard,
    backend: str,
    *,
    both: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return nu of this rank's rows against all ranks' columns, and nu of this rank's columns against all ranks' rows.
    Without `both`, the second is -inf.

    Differentiable in rows.u, cols.u and inv_tau (0-d), like `neg_lse`. Only columns are sent in the forward. In the
    backward, columns are sent for the gradient of the rows (or of inv_tau alone), and rows for the gradient of the
    columns.
    """
    ids = (rows.ids.to(torch.int64), cols.ids.to(torch.int64))
    columns = (of_rows.columns(rows.u), of_cols.columns(cols.u))
    return _CrossNegLseOverRanks.apply(rows.u, cols.u, *ids, inv_tau, *columns, both, backend)


class _NegLseOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: float | Tensor, columns: Columns, backend: str) -> Tensor:
        of_all = columns.own.new_full((columns.partition.n_rows,), -torch.inf)  # this rank's part of every row's nu
        with autocast_off(u):
            for a, b in columns.pairs(ids):
                if a.span == b.span:
                    _log_add_(of_all[a.span], run_neg_lse(Side(a.rows, a.ids), inv_tau, backend))
                else:
                    of_a, of_b = run_cross_neg_lse(Side(a.rows, a.ids), Side(b.rows, b.ids), inv_tau, backend)
                    _log_add_(of_all[a.span], of_a)
                    _log_add_(of_all[b.span], of_b)
        nu = columns.partition.exchange(of_all).logsumexp(dim=0)
        ctx.partition, ctx.backend, ctx.dtype = columns.partition, backend, u.dtype
        ctx.part = columns.partition.turn.part()
        save(ctx, inv_tau, nu, *columns.to_save(ids))
        return nu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nu: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, nu, *saved = ctx.part.begin_backward(ctx, d_nu.device)
        columns, ids = ctx.partition.columns_from(saved)
        rows, upstream = Side(columns.own, ids), Upstream(d_nu, nu)
        d_u, d_inv_tau = _gradient_of_rows(rows, upstream, columns, ids, upstream, inv_tau, ctx.backend, symmetric=True)
        of_inv_tau = d_inv_tau / 2 if ctx.needs_input_grad[2] else None  # each pair was counted twice
        return d_u.to(ctx.dtype), None, of_inv_tau, None, None


class _CrossNegLseOverRanks(torch.autograd.Function):
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
        both: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        own = of_u.own
        rows, of_all = (own.new_full((n,), -torch.inf) for n in (len(own), of_v.partition.n_rows))
        with autocast_off(u):
            for block in of_v.blocks(v_ids):
                if len(own):
                    sides = Side(own, u_ids), Side(block.rows, block.ids)
                    of_own, of_all[block.span] = run_cross_neg_lse(*sides, inv_tau, backend)
                    _log_add_(rows, of_own)
        cols = of_v.partition.exchange(of_all).logsumexp(dim=0) if both else own.new_full((len(v),), -torch.inf)
        ctx.partitions, ctx.backend, ctx.dtypes = (of_u.partition, of_v.partition), backend, (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, inv_tau, rows, cols, *of_u.to_save(u_ids), *of_v.to_save(v_ids))
        return rows, cols

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, rows, cols, *saved = ctx.part.begin_backward(ctx, d_rows.device)
        of_u, u_ids = ctx.partitions[0].columns_from(saved[:4])
        of_v, v_ids = ctx.partitions[1].columns_from(saved[4:])
        needs_u, needs_v, _, _, needs_inv_tau = ctx.needs_input_grad[:5]
        of_rows, of_cols = Upstream(d_rows, rows), Upstream(d_cols, cols)
        d_u = d_v = None
        parts = []
        if needs_u or (needs_inv_tau and not needs_v):
            d_u, part = _gradient_of_rows(Side(of_u.own, u_ids), of_rows, of_v, v_ids, of_cols, inv_tau, ctx.backend)
            parts.append(part)
        if needs_v:
            d_v, part = _gradient_of_rows(Side(of_v.own, v_ids), of_cols, of_u, u_ids, of_rows, inv_tau, ctx.backend)
            parts.append(part)
        # Each pass, summed across the ranks, covers every pair once, and so does the mean of both passes.
        d_inv_tau = torch.stack(parts).mean() if needs_inv_tau else None
        return (
            d_u.to(ctx.dtypes[0]) if needs_u and d_u is not None else None,
            d_v.to(ctx.dtypes[1]) if d_v is not None else None,
            None,
            None,
            d_inv_tau,
            *[None] * 4,
        )


def _log_add_(nu: Tensor, part: Tensor) -> None:
    torch.logaddexp(nu, part, out=nu)


def _gradient_of_rows(
    rows: Side,
    of_rows: Upstream,
    columns: Columns,
    column_ids: Tensor,
    of_columns: Upstream,
    inv_tau: float | Tensor,
    backend: str,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the gradient with respect to this rank's rows, and the gradient with respect to inv_tau over all pairs of
    these rows with the columns of all ranks. `column_ids` and `of_columns` belong to this rank's columns. With
    `symmetric`, the columns are the rows themselves, and the gradient with respect to inv_tau counts each pair within
    this rank twice."""
    d_rows, d_inv_tau = torch.zeros_like(rows.u), of_rows.neg_lse.new_zeros(())
    with autocast_off(rows.u):
        for block in columns.blocks(column_ids, torch.stack((of_columns.d_neg_lse, of_columns.neg_lse), dim=1)):
            if len(rows.u):
                if symmetric and block.span == columns.partition.span:
                    d_block, d_part = run_neg_lse_backward(rows, inv_tau, of_rows, backend)
                    d_rows += d_block
                    d_inv_tau = d_inv_tau + 2 * d_part  # doubled, because a pair across ranks is counted on both ranks
                else:
                    d_cols, cols_nu = block.numbers[0].T.contiguous()
                    of_cols = Upstream(d_cols, cols_nu, wanted=False)
                    of_block, _, d_part = run_cross_neg_lse_backward(
                        rows, Side(block.rows, block.ids), inv_tau, of_rows, of_cols, backend
                    )
                    assert of_block is not None
                    d_rows += of_block
                    d_inv_tau = d_inv_tau + d_part
    return d_rows, d_inv_tau
