"""Log-sum-exps across ranks, without the columns whose similarity to a row exceeds the row's limit.

    nu_i = log sum over {j : id_j != id_i, u_i . v_j <= limit_i} of exp(k u_i . v_j)

The limit belongs to the row, so a similarity is computed for its row's sum only. Every rank computes the similarities
of its rows with the columns of all ranks. If the columns need a gradient, the backward also computes the similarities
of this rank's columns with the rows of all ranks. Each of these rows is sent with three numbers (the weight, nu and the
limit).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import autocast_off
from ..backends.base import Upstream
from ..ops.limited import run_limited_neg_lse, run_limited_neg_lse_backward
from ..ops.register import save
from ..sides import Side
from .columns import Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def limited_neg_lse(
    rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Shard, of_cols: Shard, backend: str
) -> Tensor:
    """Return nu of this rank's rows (M,) against the columns of all ranks. Limits of the columns are ignored.

    The backward returns the gradient of the sum of all ranks' losses with respect to the rows and columns, and this
    rank's part of the gradient with respect to inv_tau.
    """
    ids = rows.ids.to(torch.int64), cols.ids.to(torch.int64)
    columns = of_rows.columns(rows.u), of_cols.columns(cols.u)
    return _LimitedNegLseOverRanks.apply(rows.u, cols.u, *ids, rows.limits, inv_tau, *columns, backend)


class _LimitedNegLseOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        limits: Tensor,
        inv_tau: float | Tensor,
        of_u: Columns,
        of_v: Columns,
        backend: str,
    ) -> Tensor:
        own = Side(of_u.own, u_ids, limits)
        nu = own.u.new_full((len(own.u),), -torch.inf)
        with autocast_off(u):
            for block in of_v.blocks(v_ids):
                if len(own.u):
                    part, _ = run_limited_neg_lse(own, _unlimited(block.rows, block.ids), inv_tau, backend)
                    nu = torch.logaddexp(nu, part)
        ctx.partitions, ctx.backend, ctx.dtypes = (of_u.partition, of_v.partition), backend, (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, inv_tau, limits, nu, *of_u.to_save(u_ids), *of_v.to_save(v_ids))
        return nu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nu: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, limits, nu, *saved = ctx.part.begin_backward(ctx, d_nu.device)
        of_u, u_ids = ctx.partitions[0].columns_from(saved[:4])
        of_v, v_ids = ctx.partitions[1].columns_from(saved[4:])
        needs_u, needs_v, _, _, _, needs_inv_tau = ctx.needs_input_grad[:6]
        d_u, d_v, of_inv_tau = torch.zeros_like(of_u.own), torch.zeros_like(of_v.own), d_nu.new_zeros(())
        with autocast_off(d_u):
            if needs_v:
                own = _unlimited(of_v.own, v_ids)
                for block in of_u.blocks(u_ids, torch.stack((d_nu, nu, limits), dim=1)):
                    if len(d_v):
                        d_block, nu_block, limits_block = block.numbers[0].T.contiguous()
                        rows, upstream = Side(block.rows, block.ids, limits_block), Upstream(d_block, nu_block, False)
                        none = Upstream(torch.zeros_like(d_v[:, 0]), torch.zeros_like(d_v[:, 0]))
                        _, part, of_block = run_limited_neg_lse_backward(
                            rows, own, inv_tau, upstream, none, ctx.backend
                        )
                        assert part is not None
                        d_v += part
                        of_inv_tau = of_inv_tau + of_block
            if needs_u or not needs_v:  # for inv_tau one pass is enough: across ranks, it covers all pairs
                of_inv_tau = d_nu.new_zeros(())
                own, upstream = Side(of_u.own, u_ids, limits), Upstream(d_nu, nu)
                for block in of_v.blocks(v_ids):
                    if len(d_u):
                        cols = _unlimited(block.rows, block.ids)
                        none = Upstream(torch.zeros_like(cols.u[:, 0]), torch.zeros_like(cols.u[:, 0]), False)
                        part, _, of_block = run_limited_neg_lse_backward(
                            own, cols, inv_tau, upstream, none, ctx.backend
                        )
                        assert part is not None
                        d_u += part
                        of_inv_tau = of_inv_tau + of_block
        return (
            d_u.to(ctx.dtypes[0]) if needs_u else None,
            d_v.to(ctx.dtypes[1]) if needs_v else None,
            None,
            None,
            None,
            of_inv_tau if needs_inv_tau else None,
            *[None] * 3,
        )


def _unlimited(u: Tensor, ids: Tensor) -> Side:
    return Side(u, ids, torch.full_like(u[:, 0], torch.inf))
