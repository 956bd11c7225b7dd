"""Numbers of all ranks, and what their gradients are worth.

The convention is DistributedDataParallel's: each rank calls backward on a loss of its own, and the parameters get the
gradient of the mean of those losses over the ranks. Whatever is formed here has the gradient of the *sum* of the ranks'
losses, of which DDP takes the mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import wire
from .shard import Shard
from .wire import uncompiled


@uncompiled
def all_sum(x: Tensor, shard: Shard) -> Tensor:
    """The sum of a number (0-d) over the ranks. Every rank's loss has it in it, so its gradient is the sum of theirs:
    taken as the ranks' number times this one's, which is scaled as the others' are."""
    return _AllSum.apply(x, shard)


@uncompiled
def sum_of_ranks(x: Tensor, shard: Shard) -> Tensor:
    """The sum over the ranks of a tensor of the same shape on each, of which each makes what it likes: its gradient is
    the sum of theirs, and travels as it did."""
    return _SumOfRanks.apply(x, shard)


@uncompiled
def replicated(x: Tensor, shard: Shard) -> Tensor:
    """A number (0-d) that is the same on every rank, a learnt temperature: its gradient is the mean of the ranks'
    gradients, on each of them. So replicas stay the same whether or not DDP averages them once more."""
    return _Replicated.apply(x, shard) if x.requires_grad and torch.is_grad_enabled() else x


@uncompiled
def log_sum_exp(x: Tensor, shard: Shard) -> Tensor:
    """log of the sum of exp(x) over all rows of all ranks (0-d), without a gradient."""
    return wire.gather_numbers(shard.group, x.detach().logsumexp(dim=0)).logsumexp(dim=0)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.world = shard.group.size()
        return wire.gather_numbers(shard.group, x).sum(dim=0)

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return d_sum * ctx.world, None


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.group = shard.group
        return wire.all_reduce(shard.group, x)

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> tuple[Tensor, None]:
        return wire.all_reduce(ctx.group, d_sum), None


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: Shard) -> Tensor:
        ctx.group = shard.group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        return wire.gather_numbers(ctx.group, d_x).mean(dim=0), None
