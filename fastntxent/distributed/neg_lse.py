"""The primitive over ranks: log-sum-exps of this rank's rows against the columns of all, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.register import autocast_off, kernels
from .shard import Columns, Shard
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

    Differentiable in u, v and inv_tau (0-d), as `neg_lse`. Where v needs no gradient, only v travels, and only once.
    """
    ids = (u_ids.to(torch.int64), v_ids.to(torch.int64))
    return _CrossNegLse.apply(u, v, *ids, inv_tau, u_shard.columns(u), v_shard.columns(v), both, backend)


class _NegLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, ids: Tensor, inv_tau: Tensor, columns: Columns, backend: str) -> Tensor:
        nu = _forward(columns.own, ids, inv_tau, columns, ids, backend)
        ctx.columns, ctx.ids, ctx.backend, ctx.dtype = columns, ids, backend, u.dtype
        ctx.save_for_backward(inv_tau, nu)
        return nu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nu: Tensor) -> tuple[Tensor | None, ...]:
        (inv_tau, nu), ids = ctx.saved_tensors, ctx.ids
        of_all = (ids, torch.stack((d_nu, nu), dim=1))
        d_u, d_inv_tau = _backward(ctx.columns.own, ids, d_nu, nu, inv_tau, ctx.columns, of_all, ctx.backend)
        return d_u.to(ctx.dtype), None, d_inv_tau / 2, None, None  # each pair is on two ranks


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
        rows = _forward(of_u.own, u_ids, inv_tau, of_v, v_ids, backend)
        if both:
            cols = _forward(of_v.own, v_ids, inv_tau, of_u, u_ids, backend)
        else:
            cols = rows.new_full((len(v),), -torch.inf)
        ctx.columns, ctx.ids, ctx.backend, ctx.dtypes = (of_u, of_v), (u_ids, v_ids), backend, (u.dtype, v.dtype)
        ctx.save_for_backward(inv_tau, rows, cols)
        return rows, cols

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, rows, cols = ctx.saved_tensors
        (of_u, of_v), (u_ids, v_ids) = ctx.columns, ctx.ids
        needs_u, needs_v, _, _, needs_inv_tau = ctx.needs_input_grad[:5]
        d_u = d_v = None
        parts = []
        if needs_u or (needs_inv_tau and not needs_v):
            of_all = (v_ids, torch.stack((d_cols, cols), dim=1))
            d_u, part = _backward(of_u.own, u_ids, d_rows, rows, inv_tau, of_v, of_all, ctx.backend)
            parts.append(part)
        if needs_v:
            of_all = (u_ids, torch.stack((d_rows, rows), dim=1))
            d_v, part = _backward(of_v.own, v_ids, d_cols, cols, inv_tau, of_u, of_all, ctx.backend)
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


def _forward(rows: Tensor, ids: Tensor, inv_tau: Tensor, columns: Columns, column_ids: Tensor, backend: str) -> Tensor:
    nu = rows.new_full((len(rows),), -torch.inf)
    with autocast_off(rows):
        for block, block_ids in columns.blocks(column_ids):
            if len(rows):
                of_block = kernels(backend, rows, inv_tau).cross_neg_lse(rows, block, ids, block_ids, inv_tau)[0]
                nu = torch.logaddexp(nu, of_block)
    return nu


def _backward(
    rows: Tensor,
    ids: Tensor,
    d_nu: Tensor,
    nu: Tensor,
    inv_tau: Tensor,
    columns: Columns,
    of_columns: tuple[Tensor, Tensor],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient in the rows, and in inv_tau over all pairs of a row here and a column anywhere. `of_columns`: the ids of
    this rank's columns, and their weights and nu as (K, 2)."""
    d_rows, d_inv_tau = torch.zeros_like(rows), nu.new_zeros(())
    with autocast_off(rows):
        for block, block_ids, numbers in columns.blocks(*of_columns):
            if len(rows):
                d_block, _, d_part = kernels(backend, rows, inv_tau).cross_neg_lse_backward(
                    d_nu, numbers[:, 0].contiguous(), rows, block, ids, block_ids, inv_tau, nu,
                    numbers[:, 1].contiguous(), True, False,
                )  # fmt: skip
                assert d_block is not None
                d_rows += d_block
                d_inv_tau = d_inv_tau + d_part
    return d_rows, d_inv_tau.to(inv_tau.device)
