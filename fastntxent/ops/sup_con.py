"""SupCon in one call: the reduced loss and its gradient.

    sup_con_scalar (z, ids, inv_tau) -> loss, d_z, d_inv_tau

l_ij are the logits, P(i) is the set of other rows with row i's id, c_i is the size of P(i), and v_i is row i's weight
(0 without positives). nu_i and lse_i are the log-sum-exps of row i's logits over the rows of other ids and over P(i):

    out    sum v_i (log sum_{j != i} e^{l_ij} - mean_{p in P(i)} l_ip)
    in     sum v_i (log(1 + e^{nu_i - lse_i}) + log c_i)
    ratio  the same as "in" without log c_i
    pairs  sum v_i / c_i sum_{p in P(i)} log(1 + e^{nu_i - l_ip})

The gradient is computed directly, without an autograd graph. A backend that has a method `sup_con_scalar` computes
everything in one call. Otherwise, if the host can see that every id occurs exactly twice, the rows are two views and
one call of NT-Xent computes everything. In all other cases, the backend's kernels compute the log-sum-exps, over all
other rows ("out") or over the rows of other ids (the other forms). For "out", groups.py sums the positives. For the
other forms, positives.py computes the sums over positives, for value and gradient in one object, which sorts the rows
at most once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import autocast_off, row_dots, row_losses
from ..backends.base import KernelBackend, Upstream
from ..backends.rows import UnitRows
from ..sides import Side
from ..validation import check_choice
from .contract import checked
from .groups import counts_of_groups, sums_and_counts
from .neg_lse import scalar_path_fake, scaled_scalar_path
from .positives import PositiveTile, PositiveTiles, through_lse, through_sum
from .register import kernels_for, register, save_gradients


def sup_con_scalar(
    z: Tensor, ids: Tensor, inv_tau: float | Tensor, form: str, normalize: bool, mean: bool, backend: str
) -> Tensor:
    """Return the sum or mean (0-d) of SupCon over the rows that have positives, differentiable in z and inv_tau."""
    return _sup_con_scalar(z, ids, inv_tau, form, normalize, mean, backend)


def _forward(
    z: Tensor, ids: Tensor, inv_tau: float | Tensor, form: str, normalize: bool, mean: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    z, ids, k = checked("sup_con_scalar", z, ids, inv_tau)
    check_choice("form", form, tuple(_LOSS_OF))
    kernels = kernels_for(backend, z)
    with autocast_off(z):
        ids = ids.to(torch.int64)
        if (at_once := getattr(kernels, "sup_con_scalar", None)) is not None:
            return at_once(z, ids, k, form, normalize, mean)
        in_order, order = ids.sort(stable=True)
        if _all_in_pairs(in_order):
            return _two_views(kernels, z, order, k, normalize, mean)
        rows = UnitRows(z, normalize)
        loss, d_u, d_k = _LOSS_OF[form](kernels, Side(rows.u, ids), in_order, k, mean)
        return loss, rows.backward(d_u), d_k


def _all_in_pairs(in_order: Tensor) -> bool:
    """Return whether each id occurs exactly twice; every form then equals NT-Xent. On an accelerator, whose values the
    host does not read, return False."""
    if not in_order.is_cpu or len(in_order) % 2:
        return False
    first, second = in_order[::2], in_order[1::2]
    return torch.equal(first, second) and bool((second[:-1] != first[1:]).all())


def _two_views(
    kernels: KernelBackend, z: Tensor, order: Tensor, k: float | Tensor, normalize: bool, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    first, second = order[::2], order[1::2]
    views = z.index_select(0, first), z.index_select(0, second)
    loss, d_first, d_second, d_k = kernels.nt_xent_scalar(*views, k, normalize, mean)
    d_z = d_first.new_empty(z.shape)
    d_z.index_copy_(0, first, d_first)
    return loss, d_z.index_copy_(0, second, d_second), d_k


_Result = tuple[Tensor, Tensor, Tensor]  # loss, d_u, d_inv_tau


def _row_weights(counts: Tensor, mean: bool, dtype: torch.dtype) -> Tensor:
    """Return each row's weight in the loss, which is 0 for a row without positives."""
    weights = (counts > 0).to(dtype)
    return weights.div_(weights.sum().clamp_min_(1)) if mean else weights


def _out_loss(kernels: KernelBackend, rows: Side, in_order: Tensor, k: float | Tensor, mean: bool) -> _Result:
    u, ids = rows.u, rows.ids
    sums, counts = sums_and_counts(u, ids, in_order)
    others, counts = sums.sub_(u), counts - 1
    weights = _row_weights(counts, mean, u.dtype)
    loss, d_u, d_k = kernels.neg_lse_sum(Side(u, torch.arange(len(u), device=u.device)), k, weights)
    shares = weights / counts.clamp_min_(1)  # equal within a group: (i, p) and (p, i) have the same share
    dots = (shares * row_dots(u, others)).sum()
    return loss - k * dots, d_u.sub_(others.mul_((2 * k * shares)[:, None])), d_k - dots


def _in_loss(kernels: KernelBackend, rows: Side, in_order: Tensor, k: float | Tensor, mean: bool) -> _Result:
    loss, d_u, d_k = _ratio_loss(kernels, rows, in_order, k, mean)
    counts = counts_of_groups(rows.ids, rows.ids, in_order) - 1
    weights = _row_weights(counts, mean, rows.u.dtype)
    return loss + (weights * counts.clamp_min_(1).to(weights.dtype).log()).sum(), d_u, d_k


def _ratio_loss(kernels: KernelBackend, rows: Side, _: Tensor, k: float | Tensor, mean: bool) -> _Result:
    u, ids = rows.u, rows.ids
    nu, tiles = kernels.neg_lse(rows, k), PositiveTiles(u, u, ids, ids, k, own=0)
    lse = tiles.lse()
    alone = lse == -torch.inf
    weights, lse = _row_weights(~alone, mean, u.dtype), lse.masked_fill_(alone, 0)
    d_nu = weights * torch.sigmoid(nu - lse)
    d_lse, of_rows = tiles.by_row(-d_nu)[:, None], tiles.by_row(lse)[:, None]
    of_pairs = tiles.backward(lambda tile: through_lse(tile, d_lse[tile.rows], of_rows[tile.rows]))
    through_nu = rows, k, Upstream(d_nu, nu)
    return (weights * row_losses(nu, lse)).sum(), *_add_negatives(kernels, of_pairs, *through_nu)


def _pairs_loss(kernels: KernelBackend, rows: Side, in_order: Tensor, k: float | Tensor, mean: bool) -> _Result:
    u, ids = rows.u, rows.ids
    nu, tiles = kernels.neg_lse(rows, k), PositiveTiles(u, u, ids, ids, k, own=0)
    counts = counts_of_groups(ids, ids, in_order) - 1
    shares = _row_weights(counts, mean, u.dtype) / counts.clamp_min_(1)
    loss = (shares * tiles.sum(nu)).sum()
    d_sums, of_rows, d_nu = tiles.by_row(shares)[:, None], tiles.by_row(nu)[:, None], torch.zeros_like(nu)

    def d_logits(tile: PositiveTile) -> Tensor:
        d = through_sum(tile, d_sums[tile.rows], of_rows[tile.rows])
        d_nu[tile.rows] -= d.sum(dim=1)
        return d

    of_pairs = tiles.backward(d_logits)
    through_nu = rows, k, Upstream(tiles.of_rows(d_nu), nu)
    return loss, *_add_negatives(kernels, of_pairs, *through_nu)


def _add_negatives(
    kernels: KernelBackend,
    of_pairs: tuple[Tensor, Tensor | None, Tensor],
    rows: Side,
    k: float | Tensor,
    upstream: Upstream,
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to u and k, through the positives and through nu. `of_pairs` is the first part:
    the gradients with respect to u as rows, to u as columns, and to k."""
    d_rows, d_cols, d_k = of_pairs
    assert d_cols is not None
    d_u, d_k_of_nu = kernels.neg_lse_backward(rows, k, upstream)
    return d_u.add_(d_rows).add_(d_cols), d_k + d_k_of_nu


_LOSS_OF = {"out": _out_loss, "in": _in_loss, "ratio": _ratio_loss, "pairs": _pairs_loss}


def _setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    z, _, inv_tau, *_ = inputs
    save_gradients(ctx, output[1:], z, inv_tau)


def _autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    d_z, d_inv_tau = scaled_scalar_path(ctx, d_loss)
    return d_z, None, d_inv_tau, None, None, None, None


_sup_con_scalar = register(
    "sup_con_scalar(Tensor z, Tensor ids, Tensor inv_tau, str form, bool normalize, bool mean, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    scalar_path_fake,
    _setup,
    _autograd,
    value_alone=True,
)
