"""What a backend is: the primitive `neg_lse` with its gradient, and NT-Xent built on it.

neg_lse and its gradient are the only O(M^2 D) work there is. A backend that has no more than those takes the rest from
`ComposedBackend`, in O(M D) tensor code around them; one whose kernels fuse all of it is a `KernelBackend`.

Symbols (M = 2N rows, k = 1/tau, [z_i; z_j] stacked; p(i) is the other view of row i's sample):

    u_i   = z_i / max(|z_i|, eps)                                    unit rows
    nu_i  = log sum over {j : id_j != id_i} of exp(k u_i . u_j)      neg_lse, -inf where the sum is empty
    pi_i  = k u_i . u_p(i)                                           pos
    loss_i = log(1 + exp(nu_i - pi_i))                               NT-Xent, the positive in the denominator
    q_i   = sigmoid(nu_i - pi_i) = d loss_i / d nu_i = - d loss_i / d pi_i

The positive is never inside the masked sum, so nothing is subtracted that was added before: the gradient keeps its
relative accuracy however small the loss becomes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..validation import FLOAT_DTYPES

NORM_EPS = 1e-12  # of torch.nn.functional.normalize


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_eps(dtype: torch.dtype) -> float:
    """The smallest norm a row is divided by. 1e-12 is zero in float16, whose smallest normal number serves there."""
    return torch.finfo(torch.float16).tiny if dtype == torch.float16 else NORM_EPS


def unit_rows(z: Tensor, normalize: bool = True) -> Tensor:
    """Rows (the last dimension) in the accumulation dtype, divided by max(|z|, eps) if asked."""
    u = z.to(accumulation_dtype(z.dtype))
    return F.normalize(u, dim=-1, eps=norm_eps(z.dtype)) if normalize else u


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """a_i . b_i for every row: (M, D), (M, D) -> (M,)."""
    return (a * b).sum(dim=1)


def swap_views(rows: Tensor) -> Tensor:
    """Row p(i) in the place of row i, for rows stacked as [z_i; z_j]."""
    first, second = rows.chunk(2)
    return torch.cat((second, first))


class UnitRows:
    """The stacked views in the accumulation dtype, normalised if asked, and the way back for their gradient."""

    def __init__(self, z_i: Tensor, z_j: Tensor, normalize: bool):
        self.z_dtype = z_i.dtype
        self.u = torch.cat((z_i, z_j)).to(accumulation_dtype(z_i.dtype))
        self.norm: Tensor | None = None
        if normalize:
            self.norm = torch.linalg.vector_norm(self.u, dim=1, keepdim=True)
            self.u = self.u / self.norm.clamp_min(norm_eps(self.z_dtype))

    def backward(self, d_u: Tensor) -> tuple[Tensor, Tensor]:
        """d/dz of both views: (d_u - u (u . d_u)) / |z| where |z| > eps, d_u / eps elsewhere."""
        if self.norm is not None:
            eps = norm_eps(self.z_dtype)
            radial = torch.where(self.norm > eps, row_dots(self.u, d_u).unsqueeze(1), 0)
            d_u = torch.addcmul(d_u, self.u, radial, value=-1).div_(self.norm.clamp_min(eps))
        d_z_i, d_z_j = d_u.chunk(2)
        return d_z_i.clone(), d_z_j.clone()  # storages of their own: an operator's outputs share none


class Backend(ABC):
    """One implementation of the losses' core. Methods allocate what they return, and neither change nor alias their
    arguments. `inv_tau` is a 0-d tensor, in host memory or on the rows' device."""

    device_types: tuple[str, ...] = ("any",)
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES

    def details(self) -> str | None:
        """What of this machine it uses, in words; None where there is nothing to say."""
        return None

    def forms(self, device: torch.device, dtype: torch.dtype) -> Sequence[str]:
        """The forms that the kernels take by a call's size, as names for `forced`; "" leaves it to the size."""
        return ("",)

    def forced(self, form: str) -> contextlib.AbstractContextManager[None]:
        """A block in which every call takes that form, whatever its size: to check all of them on small ones."""
        assert not form
        return contextlib.nullcontext()

    @abstractmethod
    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> Tensor:
        """nu of the rows: (M, D), (M,), () -> (M,) in the accumulation dtype."""

    @abstractmethod
    def cross_neg_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        """nu of the rows u (M, D) against the columns v (K, D), and of the columns against the rows: (M,) and (K,)."""

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        """nu and pi of every row, (M,) each, order [z_i; z_j]."""
        u = UnitRows(z_i, z_j, normalize).u
        return self.neg_lse(u, sample_ids(u), inv_tau), positives(u, inv_tau)


class KernelBackend(Backend):
    """A backend with gradients of its own: the registered ops call it, on detached tensors. All its results are in
    the accumulation dtype."""

    @abstractmethod
    def neg_lse_backward(
        self, d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient of sum_i d_neg_lse_i nu_i with respect to u (M, D) and k (0-d)."""

    @abstractmethod
    def cross_neg_lse_backward(
        self,
        d_rows: Tensor,
        d_cols: Tensor,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: Tensor,
        rows_neg_lse: Tensor,
        cols_neg_lse: Tensor,
        needs_u: bool,
        needs_v: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradient of sum_i d_rows_i nu_i + sum_j d_cols_j nu_j with respect to u, v and k; None where not needed."""

    def neg_lse_sum(self, u: Tensor, ids: Tensor, inv_tau: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sum_i weights_i nu_i (0-d), over the rows that have a nu, with its gradient with respect to u and k."""
        neg_lse = self.neg_lse(u, ids, inv_tau)
        return weighted_sum(neg_lse, weights), *self.neg_lse_backward(weights, u, ids, inv_tau, neg_lse)

    @abstractmethod
    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of sum_i d_neg_lse_i nu_i + d_pos_i pi_i with respect to z_i, z_j and k."""

    @abstractmethod
    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum or mean of the losses (0-d) with its gradient with respect to z_i, z_j and k."""

    def nt_xent_value(self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool) -> Tensor:
        """Sum or mean of the losses (0-d)."""
        losses = row_losses(*self.nt_xent_rows(z_i, z_j, inv_tau, normalize))
        return (losses * loss_weight(z_i, mean)).sum()


class Side(NamedTuple):
    """Rows (M, D) and the group of each (M,). One side is its own columns; two are rows and columns."""

    u: Tensor
    ids: Tensor


class NegLse(ABC):
    """neg_lse of given sides: the forward, and a backward that may use what the forward left in the workspace."""

    @abstractmethod
    def forward(self) -> tuple[Tensor, ...]:
        """nu of each side's rows."""

    @abstractmethod
    def backward(
        self, d_neg_lse: Sequence[Tensor], neg_lse: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradient of the weighted sum of all nu with respect to each side's u, None where not needed, and to k (0-d),
        with or without a `forward` before it. Called once."""


class ComposedBackend(KernelBackend):
    """NT-Xent as O(M D) tensor code around neg_lse, for kernels that fuse no more than that."""

    @abstractmethod
    def prepare(self, sides: Sequence[Side], inv_tau: Tensor) -> NegLse:
        """Set up neg_lse of one side, or between two."""

    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: Tensor) -> Tensor:
        (nu,) = self.prepare([Side(u, ids)], inv_tau).forward()
        return nu

    def neg_lse_backward(
        self, d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _backward_of_one(self.prepare([Side(u, ids)], inv_tau), d_neg_lse, neg_lse)

    def neg_lse_sum(self, u: Tensor, ids: Tensor, inv_tau: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        work = self.prepare([Side(u, ids)], inv_tau)
        (neg_lse,) = work.forward()
        return weighted_sum(neg_lse, weights), *_backward_of_one(work, weights, neg_lse)

    def cross_neg_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, cols = self.prepare([Side(u, u_ids), Side(v, v_ids)], inv_tau).forward()
        return rows, cols

    def cross_neg_lse_backward(
        self,
        d_rows: Tensor,
        d_cols: Tensor,
        u: Tensor,
        v: Tensor,
        u_ids: Tensor,
        v_ids: Tensor,
        inv_tau: Tensor,
        rows_neg_lse: Tensor,
        cols_neg_lse: Tensor,
        needs_u: bool,
        needs_v: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        work = self.prepare([Side(u, u_ids), Side(v, v_ids)], inv_tau)
        (d_u, d_v), d_inv_tau = work.backward((d_rows, d_cols), (rows_neg_lse, cols_neg_lse), (needs_u, needs_v))
        return d_u, d_v, d_inv_tau

    def nt_xent_rows_backward(
        self,
        d_neg_lse: Tensor,
        d_pos: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        inv_tau: Tensor,
        neg_lse: Tensor,
        normalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = UnitRows(z_i, z_j, normalize)
        work = self.prepare([Side(rows.u, sample_ids(rows.u))], inv_tau)
        largest = largest_of(d_neg_lse, d_pos)  # k times it may overflow where the gradient does not
        of_units = _backward_of_one(work, d_neg_lse / largest, neg_lse)
        d_z_i, d_z_j, d_inv_tau = _with_positives(rows, inv_tau, d_pos / largest, *of_units)
        return d_z_i.mul_(largest), d_z_j.mul_(largest), d_inv_tau * largest

    def nt_xent_scalar(
        self, z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = UnitRows(z_i, z_j, normalize)
        work = self.prepare([Side(rows.u, sample_ids(rows.u))], inv_tau)
        (neg_lse,) = work.forward()
        pos = positives(rows.u, inv_tau)
        weight = loss_weight(z_i, mean)
        w = torch.sigmoid(neg_lse - pos) * weight
        gradients = _with_positives(rows, inv_tau, -w, *_backward_of_one(work, w, neg_lse))
        return (row_losses(neg_lse, pos) * weight).sum(), *gradients


def _backward_of_one(work: NegLse, d_neg_lse: Tensor, neg_lse: Tensor) -> tuple[Tensor, Tensor]:
    (d_u,), d_inv_tau = work.backward([d_neg_lse], [neg_lse], [True])
    assert d_u is not None
    return d_u, d_inv_tau


def _with_positives(
    rows: UnitRows, inv_tau: Tensor, d_pos: Tensor, d_u: Tensor, d_inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the positives' part to the gradient of the masked sums, and take it back to z_i and z_j."""
    partner = swap_views(rows.u)
    d_u.addcmul_(partner, (inv_tau * (d_pos + swap_views(d_pos))).unsqueeze(1))
    d_inv_tau = d_inv_tau + torch.dot(d_pos, row_dots(rows.u, partner))
    return *rows.backward(d_u), d_inv_tau


def loss_weight(z_i: Tensor, mean: bool) -> float:
    """What a row's loss counts for: of N samples' 2N rows, the mean or the sum."""
    return 0.5 / z_i.shape[0] if mean else 1.0


def row_losses(neg_lse: Tensor, pos: Tensor) -> Tensor:
    """softplus(nu - pi), to full relative accuracy at both ends: torch's softplus turns linear at 20."""
    return 0 - F.logsigmoid(pos - neg_lse)  # a difference, so that no loss is -0


def largest_of(*weights: Tensor) -> Tensor:
    """The largest magnitude of the entries (0-d), as a divisor: not 0."""
    return torch.cat(weights).abs().amax().clamp_min(torch.finfo(weights[0].dtype).tiny)


def weighted_sum(neg_lse: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i nu_i over the rows that have a nu."""
    return (neg_lse.masked_fill(neg_lse == -torch.inf, 0) * weights).sum()


def sample_ids(u: Tensor) -> Tensor:
    """The sample of every row of [z_i; z_j]."""
    return torch.arange(u.shape[0] // 2, device=u.device).repeat(2)


def positives(u: Tensor, inv_tau: Tensor) -> Tensor:
    """pi of every row of [u_i; u_j]."""
    u_i, u_j = u.chunk(2)
    return (inv_tau * row_dots(u_i, u_j)).repeat(2)
