"""Dot products of each row u_i with the sum S_i of its group: the rows v_j of all ranks that have the same id.

    d_i = u_i . S_i,   S_i = sum over {j : id_j = id_i} of v_j
    d/du_i = a_i S_i,  d/dv_j = sum over {i : id_i = id_j} of a_i u_i

with weights a_i = d loss / d d_i. In the backward, each row u_i is sent with one number, a_i. No gradient is sent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..algebra import row_dots
from ..ops.groups import counts_of_groups, sums_of_groups
from ..ops.register import save
from . import wire
from .columns import Columns
from .shard import Shard
from .wire import uncompiled


@uncompiled
def group_dots(u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, u_shard: Shard, v_shard: Shard) -> Tensor:
    """Return d (M,), defined above, of this rank's rows u with the v of all ranks. Differentiable in u and v."""
    ids = (u_ids.to(torch.int64), v_ids.to(torch.int64))
    return _GroupDots.apply(u, v, *ids, u_shard.columns(u), v_shard.columns(v), False)


@uncompiled
def positive_dots(u: Tensor, ids: Tensor, shard: Shard) -> Tensor:
    """Like `group_dots` with v = u, except that no row counts in its own sum."""
    ids, columns = ids.to(torch.int64), shard.columns(u)
    return _GroupDots.apply(u, u, ids, ids, columns, columns, True)


@uncompiled
def group_counts(ids: Tensor, shard: Shard) -> Tensor:
    """Return, for each of this rank's rows, the number of rows on all ranks with the same id, itself included (M,)."""
    ids = ids.to(torch.int64)
    return counts_of_groups(wire.all_gather(shard.group, ids, shard.sizes), ids)


class _GroupDots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, of_u: Columns, of_v: Columns, others: bool
    ) -> Tensor:
        sums = torch.zeros_like(of_u.own)
        for block in of_v.blocks(v_ids):
            sums += sums_of_groups(block.rows, block.ids, u_ids)
        if others:
            sums -= of_v.own
        ctx.others, ctx.partition, ctx.dtypes = others, of_u.partition, (u.dtype, v.dtype)
        ctx.part = of_u.partition.turn.part()
        save(ctx, sums, v_ids, *of_u.to_save(u_ids))
        return row_dots(of_u.own, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        sums, v_ids, *saved = ctx.part.begin_backward(ctx, weights.device)
        of_u, u_ids = ctx.partition.columns_from(saved)
        needs_u, needs_v = ctx.needs_input_grad[:2]
        d_u = d_v = None
        if needs_u:
            d_u = (weights[:, None] * sums).to(ctx.dtypes[0])
        if needs_v:
            d_v = sums.new_zeros(len(v_ids), sums.shape[1])
            for block in of_u.blocks(u_ids, weights.contiguous()):
                (block_weights,) = block.numbers
                d_v += sums_of_groups(block_weights[:, None] * block.rows, block.ids, v_ids)
            if ctx.others:
                d_v -= weights[:, None] * of_u.own
            d_v = d_v.to(ctx.dtypes[1])
        return d_u, d_v, *[None] * 5
