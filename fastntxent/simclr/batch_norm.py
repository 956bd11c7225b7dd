"""BatchNorm of a batch spread across ranks. Statistics, and gradients through them, cover the rows of all ranks.

Rank r has n_r values of a channel, with mean m_r and sum of squared deviations q_r:

    n = sum_r n_r,    m = sum_r n_r m_r / n,    n v = sum_r (q_r + n_r (m_r - m)^2)

    y = gamma x_hat + beta,    x_hat = (x - m) / sqrt(v + eps)
    d_x = gamma / sqrt(v + eps) (d_y - (sum d_y + x_hat sum d_y x_hat) / n)    sums over the rows of all ranks

torch.nn.SyncBatchNorm does the same, but only on GPUs. This module runs on any device, with any number of rows on each
rank, including zero. For C channels each rank sends 2 C + 1 numbers in the forward and 2 C in the backward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..algebra import accumulation_dtype
from ..distributed import wire


def over_ranks(model: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Return the model wrapped so that every batch norm in training mode uses the rows of all ranks.

    The model itself is not changed. Its parameters and buffers are shared, not copied.
    """
    return _OverRanks(model, group)


def without_sync(model: nn.Module) -> None:
    """Turn a model's SyncBatchNorms into ordinary batch norms, in place. A SyncBatchNorm needs a GPU, but `over_ranks`
    synchronises ordinary batch norms on any device."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.process_group = None  # a process group cannot be copied
            module.__class__ = BatchNormAnyDim  # type: ignore[assignment]  # it has the same attributes


class BatchNormAnyDim(_BatchNorm):
    """A BatchNorm that, like SyncBatchNorm, takes inputs of two or more dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"the input must have at least 2 dimensions, got {input.ndim}")


class _OverRanks(nn.Module):
    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.model = model
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        with _StatisticsOfAll(self.group):
            y: Tensor = self.model(x)
        return y


class _StatisticsOfAll(TorchFunctionMode):
    """Replaces F.batch_norm in training mode.

    Every batch norm calls that function, so there are no special cases for subclasses with an activation in the
    forward, for shared or frozen modules, or for modules without parameters or running statistics.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            call = _BATCH_NORM.bind(*args, **(kwargs or {}))
            call.apply_defaults()
            if call.arguments["training"]:
                return _batch_norm(group=self.group, **call.arguments)
        return func(*args, **(kwargs or {}))


_BATCH_NORM = inspect.signature(F.batch_norm)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """Return F.batch_norm in training mode, with the statistics of the rows of all ranks."""
    n, mean, var = moments(input.detach(), group)
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    if running_var is not None:
        running_var.lerp_((var * (n / (n - 1))).to(running_var.dtype), momentum)
    y: Tensor = _Normalise.apply(input, weight, bias, n, mean, var, eps, group)
    return y


def moments(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Return the count (0-d), mean (C,) and variance (C,) of each channel's values in x (N, C, ...), over all ranks."""
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
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, n: Tensor, mean: Tensor, var: Tensor,
        eps: float, group: Any,
    ) -> Tensor:  # fmt: skip
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
        scale = inv_std if gamma is None else gamma * inv_std
        d_x = (d_x * _per_channel(scale, x)).to(x.dtype)
        wanted = ctx.needs_input_grad
        return d_x, d_gamma if wanted[1] else None, d_beta if wanted[2] else None, *[None] * 5


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))
