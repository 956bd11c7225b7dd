"""NT-Xent as O(M D) tensor code around neg_lse, for backends whose kernels compute only neg_lse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..algebra import loss_weight, row_dots, row_losses, swap_views, weighted_sum
from ..sides import Side
from .base import Upstream
from .rows import UnitRows
from .towers import ComposedTowers


class PreparedNegLse(ABC):
    """neg_lse of given sides: a forward, and a backward that may reuse results of the forward."""

    @abstractmethod
    def forward(self) -> tuple[Tensor, ...]:
        """Return nu of each side's rows."""

    @abstractmethod
    def backward(self, upstreams: Sequence[Upstream]) -> tuple[list[Tensor | None], Tensor]:
        """Return the gradient of the weighted sum of all nu with respect to each side's u, and k (0-d).

        If a side's gradient is not wanted, its entry is None. `backward` is called at most once, with or without a
        `forward` before it.
        """


class ComposedBackend(ComposedTowers):
    """Base class of backends that implement only `prepare`. NT-Xent is O(M D) tensor code around `prepare`'s result."""

    @abstractmethod
    def prepare(self, sides: Sequence[Side], inv_tau: float | Tensor) -> PreparedNegLse:
        """Return neg_lse within one side or between two."""

    def neg_lse(self, rows: Side, inv_tau: float | Tensor) -> Tensor:
        (nu,) = self.prepare([rows], inv_tau).forward()
        return nu

    def neg_lse_backward(self, rows: Side, inv_tau: float | Tensor, upstream: Upstream) -> tuple[Tensor, Tensor]:
        return _backward_of_one(self.prepare([rows], inv_tau), upstream)

    def neg_lse_sum(self, rows: Side, inv_tau: float | Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        work = self.prepare([rows], inv_tau)
        (neg_lse,) = work.forward()
        return weighted_sum(neg_lse, weights), *_backward_of_one(work, Upstream(weights, neg_lse))

    def cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        nu_rows, nu_cols = self.prepare([rows, cols], inv_tau).forward()
        return nu_rows, nu_cols

    def cross_neg_lse_backward(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        (d_rows, d_cols), d_inv_tau = self.prepare([rows, cols], inv_tau).backward([of_rows, of_cols])
        return d_rows, d_cols, d_inv_tau

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        u = UnitRows(torch.cat((z_i, z_j)), normalize).u
        return self.neg_lse(Side(u, view_ids(u)), inv_tau), positive_logits(u, inv_tau)

    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = UnitRows(torch.cat((z_i, z_j)), normalize)
        work = self.prepare([Side(rows.u, view_ids(rows.u))], inv_tau)
        largest = largest_magnitude(d_neg_lse, d_pos)  # k times a weight might overflow, even if the gradient does not
        of_units = _backward_of_one(work, Upstream(d_neg_lse / largest, neg_lse))
        d_z_i, d_z_j, d_inv_tau = _add_positives(rows, inv_tau, d_pos / largest, *of_units)
        return d_z_i.mul_(largest), d_z_j.mul_(largest), d_inv_tau * largest

    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = UnitRows(torch.cat((z_i, z_j)), normalize)
        return self._scalar(z_i, rows, Side(rows.u, view_ids(rows.u)), inv_tau, mean)

    def _scalar(
        self, z_i: Tensor, rows: UnitRows, side: Side, inv_tau: float | Tensor, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        work = self.prepare([side], inv_tau)
        (neg_lse,) = work.forward()
        pos = positive_logits(rows.u, inv_tau)
        weight = loss_weight(z_i, mean)
        w = torch.sigmoid(neg_lse - pos) * weight
        gradients = _add_positives(rows, inv_tau, -w, *_backward_of_one(work, Upstream(w, neg_lse)))
        return (row_losses(neg_lse, pos) * weight).sum(), *gradients

    def limited_neg_lse(self, rows: Side, cols: Side | None, inv_tau: float | Tensor) -> tuple[Tensor, Tensor | None]:
        nus = self.prepare([rows] if cols is None else [rows, cols], inv_tau).forward()
        return nus[0], None if cols is None else nus[1]

    def limited_neg_lse_backward(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        if cols is None:
            (d_u,), d_inv_tau = self.prepare([rows], inv_tau).backward([of_rows])
            return d_u, None, d_inv_tau
        (d_rows, d_cols), d_inv_tau = self.prepare([rows, cols], inv_tau).backward([of_rows, of_cols])
        return d_rows, d_cols, d_inv_tau

    def limited_nt_xent_scalar(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        limit_scale: float,
        limit_shift: float,
        mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = UnitRows(torch.cat((z_i, z_j)), normalize)
        return self._scalar(z_i, rows, _limited(rows.u, limit_scale, limit_shift), inv_tau, mean)

    def limited_nt_xent_value(
        self,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: float | Tensor,
        normalize: bool,
        limit_scale: float,
        limit_shift: float,
        mean: bool,
    ) -> Tensor:
        u = UnitRows(torch.cat((z_i, z_j)), normalize).u
        (nu,) = self.prepare([_limited(u, limit_scale, limit_shift)], inv_tau).forward()
        return (row_losses(nu, positive_logits(u, inv_tau)) * loss_weight(z_i, mean)).sum()

    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool) -> Tensor:
        losses = row_losses(*self.nt_xent_rows(z_i, z_j, inv_tau, normalize))
        return (losses * loss_weight(z_i, mean)).sum()


def _backward_of_one(work: PreparedNegLse, upstream: Upstream) -> tuple[Tensor, Tensor]:
    (d_u,), d_inv_tau = work.backward([upstream])
    assert d_u is not None
    return d_u, d_inv_tau


def _add_positives(
    rows: UnitRows, inv_tau: float | Tensor, d_pos: Tensor, d_u: Tensor, d_inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients with respect to z_i, z_j and k. d_u and d_inv_tau are the gradients through nu alone."""
    partner = swap_views(rows.u)
    d_u.addcmul_(partner, (inv_tau * (d_pos + swap_views(d_pos))).unsqueeze(1))
    d_inv_tau = d_inv_tau + torch.dot(d_pos, row_dots(rows.u, partner))
    d_z_i, d_z_j = rows.backward(d_u).chunk(2)
    return d_z_i.clone(), d_z_j.clone(), d_inv_tau  # cloned because an operator's outputs must not share storage


def largest_magnitude(*weights: Tensor) -> Tensor:
    """Return the largest magnitude of the entries (0-d), at least the smallest normal number, for use as a divisor."""
    return torch.cat(weights).abs().amax().clamp_min(torch.finfo(weights[0].dtype).tiny)


def _limited(u: Tensor, scale: float, shift: float) -> Side:
    """Return the rows of two views with their limits.

    A row's limit is `scale` times its similarity to its positive, plus `shift`.
    """
    return Side(u, view_ids(u), scale * positive_logits(u, 1.0) + shift)


def view_ids(u: Tensor) -> Tensor:
    """Return the sample index of every row of [z_i; z_j]."""
    return torch.arange(u.shape[0] // 2, device=u.device).repeat(2)


def positive_logits(u: Tensor, inv_tau: float | Tensor) -> Tensor:
    """Return pi of every row of [u_i; u_j]."""
    u_i, u_j = u.chunk(2)
    return (inv_tau * row_dots(u_i, u_j)).repeat(2)
