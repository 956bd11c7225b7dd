"""What the losses are made of around the operators: unit rows, 1/tau, log-sum-exps over negatives, reductions.

All of it is O(M D) differentiable tensor code in the accumulation dtype: float64 for float64 embeddings, else float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .backends.base import accumulation_dtype, norm_eps
from .validation import check_temperature


def inverse_temperature(temperature: float | Tensor, rows: Tensor, *, per_row: int | None = None) -> Tensor:
    """1 / temperature in the accumulation dtype: 0-d, or (per_row,) where one temperature per row is taken too."""
    check_temperature(temperature, rows, per_row=per_row)
    if not isinstance(temperature, Tensor):
        return _number(1.0 / temperature, rows)
    return factor(temperature, rows).reciprocal()


def factor(value: float | Tensor, rows: Tensor) -> Tensor:
    """A number or tensor that multiplies logits, in the accumulation dtype."""
    if not isinstance(value, Tensor):
        return _number(value, rows)
    if value.requires_grad or value.ndim > 0:  # its gradient is formed where the rows are
        value = value.to(rows.device)
    return value.to(accumulation_dtype(rows.dtype))


def _number(value: float, rows: Tensor) -> Tensor:
    dtype = accumulation_dtype(rows.dtype)
    if torch.compiler.is_compiling():  # of a number as a factor it makes one graph, of a constant one each
        return torch.ones((), dtype=dtype, device="cpu") * value
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def unit_rows(z: Tensor, normalize: bool = True) -> Tensor:
    """Rows (the last dimension) in the accumulation dtype, divided by max(|z|, eps) if asked."""
    u = z.to(accumulation_dtype(z.dtype))
    return F.normalize(u, dim=-1, eps=norm_eps(z.dtype)) if normalize else u


def neg_lse_of_rows(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    """nu of the rows, with one temperature for all of them or one for each.

    Row i's own 1/tau multiplies the row, and not the same row where it is a column: that product is no longer
    symmetric. It is formed whole and costs twice as much.
    """
    if inv_tau.ndim == 0:
        return ops.neg_lse(u, ids, inv_tau, backend)
    return neg_lse_of_columns(u, u, ids, ids, inv_tau, backend)


def neg_lse_of_columns(u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    """nu of the rows u against the columns v, with one temperature for all of the rows or one for each."""
    if inv_tau.ndim:
        u, inv_tau = u * inv_tau.unsqueeze(1), _number(1.0, u)
    return ops.cross_neg_lse(u, v, u_ids, v_ids, inv_tau, backend)[0]


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x itself, with a gradient times `scale`."""
    return torch.where(x.isinf(), x, x + (scale.detach() - 1) * (x - x.detach()))  # inf - inf is NaN


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b) with a gradient of zero, not NaN, where both are -inf."""
    empty = a == -torch.inf
    return torch.where(empty, b, torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)))


def group_sums(u: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For every row the sum of all rows of its group (M, D) and their number (M,); the row itself is one of them.

    A group's sum lies where the group begins in sorted order, so its place is known without asking the device how many
    groups there are. The sums have a fixed order on every device, in the backward too: `index_add` and its gradient do
    on a CPU, `index_put` and its gradient on an accelerator, which sorts, and neither does on the other's.
    """
    ids = ids.contiguous()
    in_order = ids.sort().values
    place = torch.searchsorted(in_order, ids)
    counts = torch.searchsorted(in_order, ids, right=True) - place
    if u.device.type == "cpu":
        return torch.zeros_like(u).index_add(0, place, u).index_select(0, place), counts
    return torch.zeros_like(u).index_put((place,), u, accumulate=True)[place], counts


def reduce(losses: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """The losses, their sum or their mean; `counted`: the mean is over the rows where it is True, 0 if there are none.
    Losses of the other rows are 0 already."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if counted is None else losses.sum() / counted.sum().clamp_min(1)
