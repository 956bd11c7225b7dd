"""What the losses are made of around the operators: unit rows, 1/tau, log-sum-exps over negatives, reductions.

All of it is O(M D) differentiable tensor code in the accumulation dtype: float64 for float64 embeddings, else float32.

With a shard, rows are this rank's, and what is formed over columns, groups or the whole batch is over all ranks'.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import distributed, ops
from .backends.base import accumulation_dtype, row_dots
from .backends.base import unit_rows as unit_rows
from .distributed import Shard
from .ops.groups import counts_of_groups, group_sums
from .validation import check_temperature, extremes


def inverse_temperature(
    temperature: float | Tensor, rows: Tensor, *, per_row: int | None = None, shard: Shard | None = None
) -> Tensor:
    """1 / temperature in the accumulation dtype: 0-d, or (per_row,) where one temperature per row is taken too."""
    temperature = check_temperature(temperature, rows, per_row=per_row)
    dtype = accumulation_dtype(rows.dtype)
    if not isinstance(temperature, Tensor):
        _check_invertible(temperature, torch.finfo(dtype).max)
        return number(1.0 / temperature, rows)
    # The gradient in tau is that in k times k^2, which leaves the range of float32 long before k does.
    wide = in_double(temperature)
    if limits := extremes(wide):
        differentiable = wide.requires_grad and torch.is_grad_enabled()
        largest = min(torch.finfo(dtype).max, torch.finfo(wide.dtype).max ** (0.5 if differentiable else 1.0))
        _check_invertible(limits[0], largest)
    return factor(wide.reciprocal(), rows, shard)


def _check_invertible(temperature: float, largest_inverse: float) -> None:
    if temperature < 1 / largest_inverse:
        raise ValueError(f"temperature must be at least {1 / largest_inverse:.2g}, got {temperature}")


def in_double(x: Tensor) -> Tensor:
    """x in float64, or as it is on a device that may have none."""
    return x.double() if x.device.type in ("cpu", "cuda", "meta") else x


def factor(value: float | Tensor, rows: Tensor, shard: Shard | None = None) -> Tensor:
    """A number or tensor that multiplies logits, in the accumulation dtype."""
    if not isinstance(value, Tensor):
        return number(value, rows)
    if ops.may_be_differentiated(value) or value.ndim > 0:  # its gradient is formed where the rows are
        value = value.to(rows.device)
    value = value.to(accumulation_dtype(rows.dtype))
    return distributed.replicated(value, shard) if shard and value.ndim == 0 else value


def number(value: float | Tensor, rows: Tensor) -> Tensor:
    """A Python number, or a size, as a 0-d tensor in the accumulation dtype."""
    dtype = accumulation_dtype(rows.dtype)
    # A compiler turns a factor into an input of the graph, and a constant into a graph for each value. Under
    # torch.jit.trace a size is a tensor, which a constant would lose.
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device="cpu") * value
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def nt_xent_rows(
    z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str, shard: Shard | None
) -> tuple[Tensor, Tensor]:
    """nu and pi of every row of two views, (2N,) each."""
    if shard is None:
        return ops.nt_xent_rows(z_i, z_j, inv_tau, normalize, backend)
    u_i, u_j = unit_rows(z_i, normalize), unit_rows(z_j, normalize)
    pos = inv_tau * row_dots(u_i, u_j)
    nu = neg_lse_of_rows(torch.cat((u_i, u_j)), sample_ids(z_i, shard).repeat(2), inv_tau, backend, shard)
    return nu, pos.repeat(2)


def neg_lse_of_rows(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str, shard: Shard | None = None) -> Tensor:
    """nu of the rows, with one temperature for all of them or one for each.

    Row i's own 1/tau multiplies the row, and not the same row where it is a column: that product is no longer
    symmetric. It is formed whole and costs twice as much.
    """
    if inv_tau.ndim:
        return neg_lse_of_columns(u, u, ids, ids, inv_tau, backend, shard, shard)
    if shard:
        return distributed.neg_lse(u, ids, inv_tau, shard, backend)
    return ops.neg_lse(u, ids, inv_tau, backend)


def neg_lse_of_columns(
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: Tensor,
    backend: str,
    u_shard: Shard | None = None,
    v_shard: Shard | None = None,
) -> Tensor:
    """nu of the rows u against the columns v, with one temperature for all of the rows or one for each. Without a shard
    of their own, the columns are here."""
    if inv_tau.ndim:
        u, inv_tau = u * inv_tau.unsqueeze(1), number(1.0, u)
    if u_shard and v_shard:
        return distributed.cross_neg_lse(u, v, u_ids, v_ids, inv_tau, u_shard, v_shard, backend, both=False)[0]
    return ops.cross_neg_lse(u, v, u_ids, v_ids, inv_tau, backend)[0]


def cross_neg_lse(
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: Tensor,
    backend: str,
    shard: Shard | None,
    v_shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """nu of the rows u against the columns v, and of v against u."""
    if shard:
        return distributed.cross_neg_lse(u, v, u_ids, v_ids, inv_tau, shard, v_shard or shard, backend)
    return ops.cross_neg_lse(u, v, u_ids, v_ids, inv_tau, backend)


def sample_ids(z: Tensor, shard: Shard | None) -> Tensor:
    """The index of every sample (N,), over all ranks."""
    return shard.sample_ids(z) if shard else torch.arange(z.shape[0], device=z.device)


def n_samples(z: Tensor, shard: Shard | None) -> int:
    """How many samples the batch has, over all ranks."""
    return shard.n_samples if shard else z.shape[0]


def group_dots(u: Tensor, v: Tensor, ids: Tensor | None, shard: Shard | None, v_shard: Shard | None = None) -> Tensor:
    """u_i . (the sum of the rows v of the same id, row i's own included) (M,); without ids, of all rows v."""
    if shard:
        u_ids, v_ids = (u.new_zeros(len(x), dtype=torch.int64) if ids is None else ids for x in (u, v))
        return distributed.group_dots(u, v, u_ids, v_ids, shard, v_shard or shard)
    return row_dots(u, v.sum(dim=0).expand_as(u) if ids is None else group_sums(v, ids)[0])


def positive_dots(u: Tensor, ids: Tensor, shard: Shard | None = None) -> Tensor:
    """u_i . (the sum of the other rows of its id) (M,)."""
    return distributed.positive_dots(u, ids, shard) if shard else row_dots(u, group_sums(u, ids)[0] - u)


def positive_lse(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str, shard: Shard | None = None) -> Tensor:
    """Log-sum-exp of each row's logits with the other rows of its id (M,), -inf where there are none."""
    if shard:
        return distributed.positive_lse(u, ids, inv_tau, shard)
    return ops.positive_lse(u, u, ids, ids, inv_tau, True, backend)


def positive_sum(
    u: Tensor, ids: Tensor, inv_tau: Tensor, nu: Tensor, backend: str, shard: Shard | None = None
) -> Tensor:
    """The sum over the other rows of its id of log(1 + exp(nu - logit)) (M,)."""
    if shard:
        return distributed.positive_sum(u, ids, inv_tau, nu, shard)
    return ops.positive_sum(u, u, ids, ids, inv_tau, nu, True, backend)


def sum_of_ranks(x: Tensor, shard: Shard | None) -> Tensor:
    """A sum over this rank's rows, over all ranks' (any shape)."""
    return distributed.sum_of_ranks(x, shard) if shard else x


def group_counts(ids: Tensor, shard: Shard | None) -> Tensor:
    """How many rows have each row's id, itself included (M,)."""
    return distributed.group_counts(ids, shard) if shard else counts_of_groups(ids, ids)


_Loss = TypeVar("_Loss", bound=Callable[..., Any])
_WATCHED = ("temperature", "logit_scale", "ids", "u_ids", "v_ids", "labels", "indexes")


def watched(loss: _Loss) -> _Loss:
    """Make a loss's backward raise if its temperature, ids or labels were changed in place after the call, as PyTorch's
    own losses do. (Autograd itself looks after the rows.)"""
    names = list(inspect.signature(loss).parameters)
    places = [(names.index(name), name) for name in _WATCHED if name in names]

    @functools.wraps(loss)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = loss(*args, **kwargs)
        given = [args[place] if place < len(args) else kwargs.get(name) for place, name in places]
        if isinstance(result, Tensor):
            return watch(result, *given)
        return type(result)(*(watch(x, *given) for x in result))  # a named tuple

    return cast(_Loss, call)


def watch(result: Tensor, *given: object) -> Tensor:
    """Return the result, whose backward raises if one of the given tensors was changed in place before it."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    return _Watched.apply(result, *tensors) if tensors and ops.unobserved(tensors) else result


class _Watched(torch.autograd.Function):
    """Return a copy of the first tensor; the backward checks the versions of the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.others = (None,) * len(tensors)
        return x.clone()  # not a view, so that a caller may go on in place

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if one of them was changed
        return d_x, *ctx.others

    @staticmethod
    def jvp(ctx: Any, d_x: Tensor, *_: Any) -> Tensor:
        return d_x.clone()


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x itself, with a gradient times `scale`."""
    return torch.where(x.isinf(), x, x + (scale.detach() - 1) * (x - x.detach()))  # inf - inf is NaN


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b) with a gradient of zero, not NaN, where both are -inf."""
    empty = a == -torch.inf
    return torch.where(empty, b, torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)))


def reduce(losses: Tensor, reduction: str, counted: Tensor | None = None, shard: Shard | None = None) -> Tensor:
    """The losses, their sum or their mean; `counted`: the mean is over the rows where it is True, 0 if there are none.
    Losses of the other rows are 0 already."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return batch_sum(losses, shard)
    wide = in_double(losses)  # their sum may overflow float32 where the mean does not
    if counted is not None:
        mean = batch_sum(wide, shard) / batch_sum(counted, shard).clamp_min(1)
    else:
        mean = batch_sum(wide, shard) / shard.n_rows if shard else wide.mean()
    return mean.to(losses.dtype)


def batch_sum(x: Tensor, shard: Shard | None) -> Tensor:
    """The sum of the entries (0-d)."""
    return distributed.all_sum(x.sum(), shard) if shard else x.sum()
