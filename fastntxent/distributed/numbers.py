"""Numbers that depend on all ranks, and the scale of their gradients.

The convention follows DistributedDataParallel: each rank calls backward on its local loss, and DDP averages the
parameters' gradients across the ranks. The gradient through a number computed here is the gradient of the *sum* of the
ranks' losses, and DDP's average turns it into the gradient of their mean. `replicated` itself computes this mean.
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
    """Return the sum of a number (0-d) across the ranks. Every rank's loss contains this sum, so the gradient of the
    number is the sum of the ranks' upstream gradients. The upstream gradients must be equal, so the backward multiplies
    this rank's upstream gradient by the world size."""
    return _AllSum.apply(x, shard)


@uncompiled
def sum_of_ranks(x: Tensor, shard: Shard) -> Tensor:
    """Return the all-reduced sum of a tensor that each rank may use differently. The backward all-reduces the upstream
    gradients too."""
    return _SumOfRanks.apply(x, shard)


@uncompiled
def replicated(x: Tensor, shard: Shard) -> Tensor:
    """Return a number (0-d) that is the same on every rank, such as a learnt temperature. In the backward every rank
    gets the mean of the ranks' gradients, so replicas stay equal whether or not DDP averages the gradients again."""
    return _Replicated.apply(x, shard) if x.requires_grad and torch.is_grad_enabled() else x


@uncompiled
def log_sum_exp(x: Tensor, shard: Shard) -> Tensor:
    """Return log sum exp(x) over the rows of all ranks (0-d), without a gradient."""
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
