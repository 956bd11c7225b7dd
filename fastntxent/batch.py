"""What a loss is made of: log-sum-exps, positives, groups and sums over the rows of one call.

Where the rows are is asked once, when the call opens its batch (opening.py): all of them here, for the kernels
(`LocalBatch`) or for the dense reference (`DenseBatch`), or spread over ranks (`distributed.ShardedBatch`). A loss is
written in these methods and never asks again. Columns, groups and sums are those of all ranks.

All of it is differentiable, and in the accumulation dtype: float64 for float64 embeddings, else float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .algebra import in_double, row_dots, row_losses, unit_rows, weighted_sum
from .backends.reference import BACKEND as _REFERENCE
from .ops.groups import counts_of_groups, sums_of_groups
from .scale import bias_of_logits, factor, inverse_temperature, is_per_row, logit_scale_factor
from .sides import CalledTeacher, Guide, Side, Teacher


class Batch(ABC):
    """The rows of one call, and how its losses are reduced.

    Methods take rows u (M, D) as `unit_rows` gives them and ids (M,), a group of each; inv_tau is a number, or where it
    is said one for each row, (M,).
    """

    def __init__(self, rows: Tensor, views: int, reduction: str, normalize: bool):
        self.first = rows  # (N, D), of the first view
        self.views = views
        self.reduction = reduction
        self.normalize = normalize

    # --- rows and numbers -------------------------------------------------------------------------------------------

    def unit_rows(self, z: Tensor) -> Tensor:
        """Embeddings (M, D) in the accumulation dtype, scaled to unit length if the caller wants that."""
        return unit_rows(z, self.normalize)

    def inverse_temperature(self, temperature: float | Tensor, *, per_row: int | None = None) -> float | Tensor:
        """1 / temperature, checked; (per_row,) where one for each row is taken too."""
        return self._replicated(inverse_temperature(temperature, self.first, per_row=per_row))

    def logit_scale(self, logit_scale: float | Tensor, name: str = "logit_scale") -> float | Tensor:
        """A logit scale in its place, checked."""
        return self._replicated(logit_scale_factor(logit_scale, self.first, name))

    def factor(self, value: float | Tensor) -> float | Tensor:
        """Another number that multiplies logits."""
        return self._replicated(factor(value, self.first))

    def bias(self, value: float | Tensor, name: str = "bias") -> Tensor:
        """A number that is added to every logit (0-d), checked."""
        replicated = self._replicated(bias_of_logits(value, self.first, name))
        assert isinstance(replicated, Tensor)
        return replicated

    def _replicated(self, value: float | Tensor) -> float | Tensor:
        """A number that is the same wherever there are rows of the batch."""
        return value

    def beside(self, rows: Tensor) -> Batch:
        """The batch of other rows (K, D) that the same call takes, as negatives of all queries."""
        return type(self)(rows, 1, self.reduction, self.normalize)

    def in_tiles(self) -> Batch:
        """The batch with log-sum-exps from the very logits that `soft_dots` forms, to the bit."""
        return self

    @property
    def n_samples(self) -> int:
        """Samples of the batch."""
        return self.first.shape[0]

    def sample_ids(self) -> Tensor:
        """The number of each sample (N,)."""
        return torch.arange(self.first.shape[0], device=self.first.device)

    def row_ids(self) -> Tensor:
        """The number of each row of all views (M,)."""
        return torch.arange(self.views * self.first.shape[0], device=self.first.device)

    def as_compared(self, u: Tensor) -> Tensor:
        """Rows as they are compared, with the gradient of the rows as they are."""
        return u

    def all_rows(self, u: Tensor) -> Tensor:
        """The rows of the whole batch, without a gradient where they come from afar."""
        return u

    def gather(self, x: Tensor) -> Tensor:
        """One entry a sample (N, ...) to those of the whole batch, without a gradient where they come from afar."""
        return x

    # --- log-sum-exps -----------------------------------------------------------------------------------------------

    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, limits: Tensor | None = None) -> Tensor:
        """nu_i = log sum over {j : id_j != id_i} of exp(k u_i . u_j) (M,), with one temperature or one for each row.

        Row i's own 1/tau multiplies the row, and not the same row where it is a column: that product is no longer
        symmetric. It is formed whole and costs twice as much.

        limits: of each row the largest similarity that its sum takes (M,), a constant.
        """
        if is_per_row(inv_tau):
            return self.neg_lse_to(Side(u, ids, limits), Side(u, ids), inv_tau)
        if limits is not None:
            return self._limited_neg_lse(Side(u, ids, limits), None, inv_tau, self, both=False)[0]
        return self._neg_lse(u, ids, inv_tau)

    def neg_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor, *, beside: Batch | None = None) -> Tensor:
        """nu of the rows against the columns (M,), with one temperature or one for each row. The columns are rows of
        this batch, or of the one `beside` it."""
        if is_per_row(inv_tau):
            limits = None if rows.limits is None else rows.limits * inv_tau.detach()
            rows, inv_tau = Side(rows.u * inv_tau.unsqueeze(1), rows.ids, limits), 1.0
        if rows.limits is not None:
            return self._limited_neg_lse(rows, _unlimited(cols), inv_tau, beside or self, both=False)[0]
        return self._neg_lse_to(rows, cols, inv_tau, beside or self)

    def limited_cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """`cross_neg_lse` of two sides that have limits."""
        return self._limited_neg_lse(rows, cols, inv_tau, self, both=True)

    @abstractmethod
    def _limited_neg_lse(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, of_cols: Batch, *, both: bool
    ) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor: ...

    def _neg_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor, of_cols: Batch) -> Tensor:
        return self.cross_neg_lse(rows, cols, inv_tau, beside=of_cols)[0]

    @abstractmethod
    def cross_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, *, beside: Batch | None = None
    ) -> tuple[Tensor, Tensor]:
        """nu of the rows against the columns (M,), and of the columns against the rows (K,), from one pass."""

    @abstractmethod
    def neg_lse_to_held(self, rows: Side, cols: Side, inv_tau: float | Tensor, held: Tensor | None = None) -> Tensor:
        """nu of the rows (M,) against columns that every rank holds for itself beside the batch: a queue, a bank.

        held: how many of them count, from the first on, a 0-d integer tensor in host memory; None: all.
        """

    @abstractmethod
    def guided_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide, *, beside: Batch | None = None
    ) -> Tensor:
        """nu of the rows against the columns (M,) but for those that the guide leaves out. The columns are rows of this
        batch, or of the one `beside` it."""

    def held_loss(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, pos: Tensor, held: Tensor | None = None
    ) -> Tensor:
        """log(1 + exp(nu - pos)) of the rows against such columns, reduced."""
        return self.reduce(row_losses(self.neg_lse_to_held(rows, cols, inv_tau, held), pos))

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """Of two views nu, and pi, the logit with the other view, of every row: (2N,) each."""
        u_i, u_j = self.unit_rows(z_i), self.unit_rows(z_j)
        pos = inv_tau * row_dots(u_i, u_j)
        return self._neg_lse(torch.cat((u_i, u_j)), self.sample_ids().repeat(2), inv_tau), pos.repeat(2)

    # --- positives and groups ---------------------------------------------------------------------------------------

    def all_dots(self, u: Tensor, v: Tensor, *, beside: Batch | None = None) -> Tensor:
        """u_i . (the sum of all rows v) (M,), of this batch or of the one `beside` it."""
        return row_dots(u, v.sum(dim=0).expand_as(u))

    def group_dots(self, u: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        """u_i . (the sum of the rows v of the same id, row i's own included) (M,)."""
        return row_dots(u, sums_of_groups(v, ids, ids))

    def positive_dots(self, u: Tensor, ids: Tensor) -> Tensor:
        """u_i . (the sum of the other rows of its id) (M,)."""
        return row_dots(u, sums_of_groups(u, ids, ids) - u)

    def group_counts(self, ids: Tensor) -> Tensor:
        """How many rows have each row's id, itself included (M,)."""
        return counts_of_groups(ids, ids)

    @abstractmethod
    def positive_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        """Log-sum-exp of each row's logits with the other rows of its id (M,), -inf where there are none."""

    def positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor:
        """Log-sum-exp of each row's logits with the columns of its id (M,), -inf where there are none; with one
        temperature or one for each row."""
        if is_per_row(inv_tau):
            rows, inv_tau = Side(rows.u * inv_tau.unsqueeze(1), rows.ids), 1.0
        return self._positive_lse_to(rows, cols, inv_tau)

    @abstractmethod
    def _positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor: ...

    @abstractmethod
    def positive_sum(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor) -> Tensor:
        """The sum over the other rows of its id of log(1 + exp(nu - logit)) (M,)."""

    @abstractmethod
    def softplus_sums(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: Tensor, *, positives: bool
    ) -> Tensor:
        """The sum over the rows of other groups of log(1 + exp(k u_i . v_j + b)) (M,), among themselves or against
        columns; `positives`, against columns: and over those of the same group of log(1 + exp(-k u_i . v_j - b))."""

    @abstractmethod
    def called_neg_lse(
        self, similarities: Callable[[Tensor, Tensor], Tensor], inv_tau: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """nu of images and of texts, and the logits of the pairs, of similarities that come from a function of the
        samples' numbers (`sample_ids`) and is of that dtype: (N,) each, without a gradient."""

    @abstractmethod
    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        """What the teacher expects of u_i . v_j: of each row the sum of p_ij u_i . v_j over the columns of other groups
        (M,), p_ij the teacher's softmax of the row over all columns, and the same of each column over the rows (K,)."""

    # --- sums and losses --------------------------------------------------------------------------------------------

    def total(self, x: Tensor) -> Tensor:
        """The sum of the entries (0-d)."""
        return x.sum()

    def sum_of_ranks(self, x: Tensor) -> Tensor:
        """What was summed over the rows here, over all rows (any shape)."""
        return x

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """log of the sum of exp(x) over all rows (0-d), without a gradient."""
        return x.detach().logsumexp(dim=0)

    def reduce(self, losses: Tensor, counted: Tensor | None = None) -> Tensor:
        """The losses, their sum or their mean, as the caller wants; `counted`: the mean is over the rows where it is
        True, 0 if there are none. Losses of the other rows are 0 already."""
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return self.total(losses)
        wide = in_double(losses)  # their sum may overflow float32 where the mean does not
        if counted is None:
            return self._mean(wide).to(losses.dtype)
        return (self.total(wide) / self.total(counted).clamp_min(1)).to(losses.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean()

    def limited_nt_xent_at_once(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, limit_scale: float, limit_shift: float
    ) -> Tensor | None:
        """NT-Xent whose rows take negatives up to limit_scale times the similarity to their positive, plus limit_shift,
        reduced, with its gradient from the same call, where there is such a call."""
        return None

    def nt_xent(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> Tensor:
        """log(1 + exp(nu - pi)) of the rows of two views, reduced."""
        return self.reduce(row_losses(*self.nt_xent_rows(z_i, z_j, inv_tau)))

    def info_nce_at_once(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, *, both: bool) -> Tensor | None:
        """The loss of queries z_i that pick their keys z_j among all samples', or of `both` directions half, reduced,
        with its gradient from the same call, where there is such a call."""
        return None

    def sigmoid_at_once(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, bias: Tensor, *, two_views: bool
    ) -> Tensor | None:
        """SigLIP's loss of pairs, or NT-Logistic's of two views, reduced, with its gradient from the same call, where
        there is such a call."""
        return None

    def soft_dots_at_once(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> Tensor | None:
        """All sums of `soft_dots` added up (0-d), with the gradient from the same call, where there is such a call."""
        return None

    def sup_con_at_once(self, z: Tensor, ids: Tensor, inv_tau: float | Tensor, form: str) -> Tensor | None:
        """SupCon of embeddings (M, D), reduced, with its gradient from the same call, where there is such a call."""
        return None

    def neg_lse_less(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, mean: Tensor, counted: Tensor) -> Tensor:
        """nu - mean of the rows that are counted, and 0 of the others, reduced over those that are."""
        losses = self.neg_lse(u, ids, inv_tau) - mean
        return self.reduce(losses.masked_fill(~counted, 0), counted=counted)

    def weighted_neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, weights: Tensor) -> Tensor:
        """sum_i weights_i nu_i (0-d) over the rows here that have a nu; no gradient in the weights."""
        return weighted_sum(self.neg_lse(u, ids, inv_tau), weights)


def _unlimited(side: Side) -> Side:
    return side._replace(limits=torch.full_like(side.u[:, 0], torch.inf).detach())


class LocalBatch(Batch):
    """All rows are here, for a backend's kernels."""

    def __init__(self, rows: Tensor, views: int, reduction: str, normalize: bool, backend: str = "auto"):
        super().__init__(rows, views, reduction, normalize)
        self._backend = backend

    def beside(self, rows: Tensor) -> LocalBatch:
        return LocalBatch(rows, 1, self.reduction, self.normalize, self._backend)

    def in_tiles(self) -> LocalBatch:
        return LocalBatch(self.first, self.views, self.reduction, self.normalize, "blocked")

    def _neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        return ops.neg_lse(u, ids, inv_tau, self._backend)

    def cross_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, *, beside: Batch | None = None
    ) -> tuple[Tensor, Tensor]:
        return ops.cross_neg_lse(rows.u, cols.u, rows.ids, cols.ids, inv_tau, self._backend)

    def _limited_neg_lse(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, of_cols: Batch, *, both: bool
    ) -> tuple[Tensor, Tensor]:
        return ops.limited_neg_lse(rows, cols, inv_tau, self._backend)

    def limited_nt_xent_at_once(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, limit_scale: float, limit_shift: float
    ) -> Tensor | None:
        if self.reduction == "none" or is_per_row(inv_tau):
            return None
        options = self.normalize, limit_scale, limit_shift, self.reduction == "mean", self._backend
        return ops.limited_nt_xent_scalar(z_i, z_j, inv_tau, *options)

    def neg_lse_to_held(self, rows: Side, cols: Side, inv_tau: float | Tensor, held: Tensor | None = None) -> Tensor:
        return ops.held_neg_lse(rows.u, cols.u, rows.ids, cols.ids, held, inv_tau, self._backend)

    def guided_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide, *, beside: Batch | None = None
    ) -> Tensor:
        return ops.guided_neg_lse(rows, cols, inv_tau, guide)

    def held_loss(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, pos: Tensor, held: Tensor | None = None
    ) -> Tensor:
        if self.reduction == "none" or not ops.may_be_differentiated(rows.u, inv_tau, pos):
            return super().held_loss(rows, cols, inv_tau, pos, held)
        sides = rows.u, cols.u, rows.ids, cols.ids
        return ops.held_loss(*sides, held, inv_tau, pos, self.reduction == "mean", self._backend)

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        return ops.nt_xent_rows(z_i, z_j, inv_tau, self.normalize, self._backend)

    def nt_xent(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> Tensor:
        if self.reduction == "none":
            return super().nt_xent(z_i, z_j, inv_tau)
        return ops.nt_xent_scalar(z_i, z_j, inv_tau, self.normalize, self.reduction == "mean", self._backend)

    def info_nce_at_once(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, *, both: bool) -> Tensor | None:
        if self.reduction == "none" or is_per_row(inv_tau):
            return None
        mean = self.reduction == "mean"
        return ops.info_nce_scalar(z_i, z_j, inv_tau, self.normalize, both, mean, self._backend)

    def sigmoid_at_once(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, bias: Tensor, *, two_views: bool
    ) -> Tensor | None:
        if self.reduction == "none":
            return None
        mean = self.reduction == "mean"
        return ops.sigmoid_scalar(z_i, z_j, inv_tau, bias, self.normalize, two_views, mean, self._backend)

    def sup_con_at_once(self, z: Tensor, ids: Tensor, inv_tau: float | Tensor, form: str) -> Tensor | None:
        if self.reduction == "none" or not ops.may_be_differentiated(z, inv_tau):
            return None
        return ops.sup_con_scalar(z, ids, inv_tau, form, self.normalize, self.reduction == "mean", self._backend)

    def neg_lse_less(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, mean: Tensor, counted: Tensor) -> Tensor:
        if self.reduction == "none" or is_per_row(inv_tau):
            return super().neg_lse_less(u, ids, inv_tau, mean, counted)
        weights = counted.to(mean.dtype)
        if self.reduction == "mean":
            weights = weights / weights.sum().clamp_min(1)
        # Linear in nu, so its gradient is known with its value.
        return self.weighted_neg_lse(u, ids, inv_tau, weights) - (weights * mean).sum()

    def weighted_neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, weights: Tensor) -> Tensor:
        return ops.neg_lse_sum(u, ids, inv_tau, weights, self._backend)

    def softplus_sums(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: Tensor, *, positives: bool
    ) -> Tensor:
        return ops.softplus_sums(rows, cols, inv_tau, bias, positives=positives, backend=self._backend)

    def called_neg_lse(
        self, similarities: Callable[[Tensor, Tensor], Tensor], inv_tau: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.sample_ids()
        return ops.called_neg_lse(ids, ids, similarities, inv_tau, dtype)

    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        return ops.soft_dots(rows, cols, teacher)

    def soft_dots_at_once(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> Tensor | None:
        return None if self.reduction == "none" else ops.soft_dots_sum(rows, cols, teacher)

    def positive_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        return ops.positive_lse(u, u, ids, ids, inv_tau, same=True)

    def _positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor:
        return ops.positive_lse(rows.u, cols.u, rows.ids, cols.ids, inv_tau, same=False)

    def positive_sum(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor) -> Tensor:
        return ops.positive_sum(u, u, ids, ids, inv_tau, nu, same=True)


class DenseBatch(Batch):
    """All rows are here, for the reference: plain PyTorch that holds every similarity."""

    def _neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        with ops.autocast_off(u):
            return _REFERENCE.neg_lse(Side(u, ids), inv_tau)

    def cross_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, *, beside: Batch | None = None
    ) -> tuple[Tensor, Tensor]:
        with ops.autocast_off(rows.u):
            return _REFERENCE.cross_neg_lse(rows, cols, inv_tau)

    def _limited_neg_lse(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, of_cols: Batch, *, both: bool
    ) -> tuple[Tensor, Tensor]:
        with ops.autocast_off(rows.u):
            if cols is None:
                return _REFERENCE.neg_lse(rows, inv_tau), rows.u.new_empty(0)
            return _REFERENCE.cross_neg_lse(rows, cols, inv_tau)

    def neg_lse_to_held(self, rows: Side, cols: Side, inv_tau: float | Tensor, held: Tensor | None = None) -> Tensor:
        n = len(cols.u) if held is None else int(held)
        return self.cross_neg_lse(rows, Side(cols.u[:n], cols.ids[:n]), inv_tau)[0]

    def guided_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide, *, beside: Batch | None = None
    ) -> Tensor:
        with ops.autocast_off(rows.u):
            return _REFERENCE.guided_neg_lse(rows, cols, inv_tau, guide)

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        with ops.autocast_off(z_i):
            return _REFERENCE.nt_xent_rows(z_i, z_j, inv_tau, self.normalize)

    def softplus_sums(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: Tensor, *, positives: bool
    ) -> Tensor:
        with ops.autocast_off(rows.u):
            return _REFERENCE.softplus(rows, cols, inv_tau, bias, positives=positives)

    def called_neg_lse(
        self, similarities: Callable[[Tensor, Tensor], Tensor], inv_tau: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        ids = self.sample_ids()
        with ops.autocast_off(ids):
            return _REFERENCE.called_neg_lse(similarities(ids, ids), ids, inv_tau)

    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        with ops.autocast_off(rows.u):
            return _REFERENCE.soft_dots(rows, cols, teacher)

    def positive_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        with ops.autocast_off(u):
            return _REFERENCE.positive_lse(u, u, ids, ids, inv_tau, same=True)

    def _positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor:
        with ops.autocast_off(rows.u):
            return _REFERENCE.positive_lse(rows.u, cols.u, rows.ids, cols.ids, inv_tau, same=False)

    def positive_sum(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor) -> Tensor:
        with ops.autocast_off(u):
            return _REFERENCE.positive_sum(u, u, ids, ids, inv_tau, nu, same=True)
