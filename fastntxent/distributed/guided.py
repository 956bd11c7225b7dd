"""The log-sum-exp without the pairs that a guide excludes, and its gradient, across ranks.

This rank's rows are compared with the columns of all ranks. In the forward, each column is sent with its guide
embedding. In the backward, each rank computes the gradients of its rows and of its columns. For the gradients of rows,
the columns are sent as in the forward. For the gradients of columns, each row is sent with its guide embedding and
three numbers (d_nu, nu and the limit). No gradient of an embedding is sent. ops/guided.py has the formulas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import autocast_off
from ..ops.guided import run_guided_neg_lse, run_guided_neg_lse_backward
from ..ops.register import save
from ..sides import Guide, Side
from .columns import Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def guided_neg_lse(
    rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide, of_rows: Shard, of_cols: Shard
) -> Tensor:
    """Return nu of this rank's rows (M,) against the columns of all ranks.

    The backward returns the gradient of the sum of all ranks' losses with respect to the rows and columns, and this
    rank's part of the gradient with respect to inv_tau (0-d).
    """
    ids = rows.ids.to(torch.int64), cols.ids.to(torch.int64)
    columns = of_rows.columns(rows.u), of_cols.columns(cols.u)
    return _GuidedNegLseOverRanks.apply(rows.u, cols.u, *ids, inv_tau, *guide, *columns)


class _GuidedNegLseOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: float | Tensor,
        g_u: Tensor,
        g_v: Tensor,
        limits: Tensor,
        of_u: Columns,
        of_v: Columns,
    ) -> Tensor:
        own = of_u.own
        nu = own.new_full((len(own),), -torch.inf)
        with autocast_off(u):
            for block in of_v.blocks(v_ids, g_v):
                if len(own):
                    cols, guide = Side(block.rows, block.ids), Guide(g_u, block.numbers[0], limits)
                    nu = torch.logaddexp(nu, run_guided_neg_lse(Side(own, u_ids), cols, inv_tau, guide))
        ctx.partitions, ctx.dtypes = (of_u.partition, of_v.partition), (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, inv_tau, nu, g_u, g_v, limits, *of_u.to_save(u_ids), *of_v.to_save(v_ids))
        return nu

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nu: Tensor) -> tuple[Tensor | None, ...]:
        inv_tau, nu, g_u, g_v, limits, *saved = ctx.part.begin_backward(ctx, d_nu.device)
        of_u, u_ids = ctx.partitions[0].columns_from(saved[:4])
        of_v, v_ids = ctx.partitions[1].columns_from(saved[4:])
        needs_u, needs_v, _, _, needs_inv_tau = ctx.needs_input_grad[:5]
        own_u, own_v = Side(of_u.own, u_ids), Side(of_v.own, v_ids)
        d_u, d_v = torch.zeros_like(own_u.u), torch.zeros_like(own_v.u)
        d_inv_tau = d_nu.new_zeros(())
        with autocast_off(d_u):
            if needs_u or needs_inv_tau:
                for block in of_v.blocks(v_ids, g_v):
                    if len(d_u):
                        cols, guide = Side(block.rows, block.ids), Guide(g_u, block.numbers[0], limits)
                        of_block, _, part = run_guided_neg_lse_backward(
                            d_nu, own_u, cols, inv_tau, guide, nu, needs_u=True, needs_v=False
                        )
                        assert of_block is not None
                        d_u += of_block
                        d_inv_tau = d_inv_tau + part
            if needs_v:
                for block in of_u.blocks(u_ids, g_u, torch.stack((d_nu, nu, limits), dim=1)):
                    if len(d_v):
                        block_g, numbers = block.numbers
                        block_d_nu, block_nu, block_limits = numbers.T.contiguous()
                        rows, guide = Side(block.rows, block.ids), Guide(block_g, g_v, block_limits)
                        _, of_block, _ = run_guided_neg_lse_backward(
                            block_d_nu, rows, own_v, inv_tau, guide, block_nu, needs_u=False, needs_v=True
                        )
                        assert of_block is not None
                        d_v += of_block
        return (
            d_u.to(ctx.dtypes[0]) if needs_u else None,
            d_v.to(ctx.dtypes[1]) if needs_v else None,
            None,
            None,
            d_inv_tau if needs_inv_tau else None,
            *[None] * 5,
        )
