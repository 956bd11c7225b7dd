"""The primitive over ranks: log-sum-exps of this rank's rows against the columns of all, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.register import autocast_off, run_kernel
from .columns import Columns
from .shard import Shard
from .wire import eager


@eager
def neg_lse(u: Tensor, ids: Tensor, inv_tau: Tensor, shard: Shard, backend: str) -> Tensor:
    """nu of this rank's rows (M,) against the rows of all ranks, differentiable in u and inv_tau (0-d).

    The gradient in u is that of the sum of the ranks' losses; that in inv_tau is this rank's part of it.
    """
    return _NegLse.apply(u, ids.to(torch.int64), inv_tau, shard.columns(u), backend)


@eager
def cross_neg_lse(
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: Tensor,
    u_shard: Shard,
    v_shard: Shard,
    backend: str,
    *,
    both: bool = True,
) -> tuple[Tensor, Tensor]:
    """nu of this rank's rows u against all ranks' v, and with `both` of this rank's v against all ranks' u, else -inf.

    Differentiable in u, v and inv_tau (0-d), as `neg_lse`. v travels; u does where v needs a gradient, in the backward.
    """
    ids = (u_ids.to(torch.int64), v_ids.to(torch.int64))
    return _CrossNegLse.apply(u, v, *ids, inv_tau, u_shard.columns(u), v_shard.columns(v), both, backend)


class _NegLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: Tensor, columns: Columns, backend: str) -> Tensor:
        of_all = columns.own.new_full((columns.layout.n_rows,), -torch.inf)  # what this rank knows of each row's nu
        with autocast_off(u):
            for a, b in columns.pairs(ids):
                if a.span == b.span:
                    _log_add_(of_all[a.span], run_kernel(backend, "neg_lse", a.rows, a.ids, inv_tau))
                else:
                    of_a, of_b = run_kernel(backend, "cross_neg_lse", a.rows, b.rows, a.ids, b.ids, inv_tau)
                    _log_add_(of_all[a.span], of_a)
                    _log_add_(of_all[b.span], of_b)
        nu = columns.layout.exchange(of_all).logsumexp(dim=0)
        ctx.layout, ctx.backend, ctx.dtype = columns.layout, backend, u.dtype
        ctx.part = columns.layout.turn.part()
        ctx.save_for_backward(inv_tau, nu, *columns.save(ids))
        return nu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nu: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, nu, *saved = ctx.part.begin_backward(ctx, d_nu.device)
        columns, ids = ctx.layout.restore(saved)
        own = columns.own
        d_u, d_inv_tau = _backward(own, ids, d_nu, nu, inv_tau, columns, ids, d_nu, nu, ctx.backend, symmetric=True)
        return d_u.to(ctx.dtype), None, d_inv_tau / 2, None, None  # each pair comes twice


class _CrossNegLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: Tensor,
        of_u: Columns,
        of_v: Columns,
        both: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        own = of_u.own
        rows, of_all = (own.new_full((n,), -torch.inf) for n in (len(own), of_v.layout.n_rows))
        with autocast_off(u):
            for block in of_v.blocks(v_ids):
                if len(own):
                    sides = (own, block.rows, u_ids, block.ids)
                    of_own, of_all[block.span] = run_kernel(backend, "cross_neg_lse", *sides, inv_tau)
                    _log_add_(rows, of_own)
        cols = of_v.layout.exchange(of_all).logsumexp(dim=0) if both else own.new_full((len(v),), -torch.inf)
        ctx.layouts, ctx.backend, ctx.dtypes = (of_u.layout, of_v.layout), backend, (u.dtype, v.dtype)
        ctx.part = of_u.layout.turn.part()
        ctx.save_for_backward(inv_tau, rows, cols, *of_u.save(u_ids), *of_v.save(v_ids))
        return rows, cols

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, rows, cols, *saved = ctx.part.begin_backward(ctx, d_rows.device)
        of_u, u_ids = ctx.layouts[0].restore(saved[:4])
        of_v, v_ids = ctx.layouts[1].restore(saved[4:])
        needs_u, needs_v, _, _, needs_inv_tau = ctx.needs_input_grad[:5]
        d_u = d_v = None
        parts = []
        if needs_u or (needs_inv_tau and not needs_v):
            d_u, part = _backward(of_u.own, u_ids, d_rows, rows, inv_tau, of_v, v_ids, d_cols, cols, ctx.backend)
            parts.append(part)
        if needs_v:
            d_v, part = _backward(of_v.own, v_ids, d_cols, cols, inv_tau, of_u, u_ids, d_rows, rows, ctx.backend)
            parts.append(part)
        # A pair counts on the rank of its row and on that of its column, where both are formed.
        d_inv_tau = torch.stack(parts).mean() if parts else None
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


def _backward(
    rows: Tensor,
    ids: Tensor,
    d_nu: Tensor,
    nu: Tensor,
    inv_tau: Tensor,
    columns: Columns,
    column_ids: Tensor,
    d_columns: Tensor,
    columns_nu: Tensor,
    backend: str,
    *,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient in the rows, and in inv_tau over all pairs of a row here and a column anywhere. What is given of the
    columns is of this rank's. `symmetric`: they are the rows."""
    d_rows, d_inv_tau = torch.zeros_like(rows), nu.new_zeros(())
    with autocast_off(rows):
        for block in columns.blocks(column_ids, torch.stack((d_columns, columns_nu), dim=1)):
            if len(rows):
                if symmetric and block.span == columns.layout.span:
                    d_block, d_part = run_kernel(backend, "neg_lse_backward", d_nu, rows, ids, inv_tau, nu)
                    d_rows += d_block
                    d_inv_tau = d_inv_tau + 2 * d_part  # it counts a pair once
                else:
                    d_cols, cols_nu = block.numbers[0].T.contiguous()
                    sides = (rows, block.rows, ids, block.ids)
                    of_block, _, d_part = run_kernel(
                        backend, "cross_neg_lse_backward", d_nu, d_cols, *sides, inv_tau, nu, cols_nu, True, False
                    )
                    d_rows += of_block
                    d_inv_tau = d_inv_tau + d_part
    return d_rows, d_inv_tau.to(inv_tau.device)
