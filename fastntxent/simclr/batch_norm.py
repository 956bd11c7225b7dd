"""BatchNorm of a batch that is spread over ranks: statistics, and gradients through them, are those of all rows.

From n_r values of a channel on rank r, with mean m_r and sum of squared differences q_r from it:

    n = sum_r n_r,    m = sum_r n_r m_r / n,    n v = sum_r q_r + n_r (m_r - m)^2

    y = gamma x_hat + beta,    x_hat = (x - m) / sqrt(v + eps)
    d_x = gamma / sqrt(v + eps) (d_y - (sum d_y + x_hat sum d_y x_hat) / n)        sums over all ranks

torch.nn.SyncBatchNorm is the same, for CUDA devices alone. This one is for any device, and any number of rows on each
rank, also none. 2 C + 1 numbers of a rank travel forward and 2 C backward, for C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends.base import accumulation_dtype
from ..distributed import wire


def over_ranks(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """A twin of a model, to be trained, whose BatchNorms are over the ranks. Its parameters and buffers are the model's
    own, which for the rest stays as it is."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for parent in list(twin.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, BatchNormOverRanks(child, group))
    return twin


class BatchNormOverRanks(nn.Module):
    """A BatchNorm in training mode, of the rows of all ranks; parameters and running statistics are in `norm`."""

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.norm = norm
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        n, mean, var = moments(x.detach(), self.group)
        assert norm.num_batches_tracked is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * (n / (n - 1)), norm.momentum)
        y: Tensor = _Normalise.apply(x, norm.weight, norm.bias, n, mean, var, norm.eps, self.group)
        return y


def moments(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """How many values a channel of x (N, C, ...) has on all ranks (0-d), their mean and their variance (C,)."""
    x = x.to(accumulation_dtype(x.dtype))
    count = x.numel() // x.shape[1]
    mean = x.sum(_but_channels(x)) / max(count, 1)
    squares = (x - _per_channel(mean, x)).square().sum(_but_channels(x))
    of_ranks = wire.gather_numbers(group, torch.cat((mean.new_full((1,), count), mean, squares)))
    counts, means, squares = of_ranks.split((1, len(mean), len(mean)), dim=1)
    n = counts.sum()
    mean = (counts * means).sum(0) / n
    return n, mean, (squares + counts * (means - mean).square()).sum(0) / n


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, n: Tensor, mean: Tensor, var: Tensor, eps: float, group: Any
    ) -> Tensor:
        ctx.eps, ctx.group = eps, group
        ctx.save_for_backward(x, gamma, n, mean, var)
        return F.batch_norm(x, mean, var, gamma, beta, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, n, mean, var = ctx.saved_tensors
        dims, inv_std = _but_channels(x), (var + ctx.eps).rsqrt()
        d_y = d_y.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(inv_std, x)
        d_beta, d_gamma = d_y.sum(dims), (d_y * x_hat).sum(dims)
        of_beta, of_gamma = wire.gather_numbers(ctx.group, torch.stack((d_beta, d_gamma))).sum(0) / n
        d_x = d_y - _per_channel(of_beta, x) - x_hat * _per_channel(of_gamma, x)
        return (d_x * _per_channel(gamma * inv_std, x)).to(x.dtype), d_gamma, d_beta, *[None] * 5


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))
