"""The building blocks of a loss: log-sum-exps, positives, groups and sums over the rows of one call.

A call opens one batch (opening.py), and the class of the batch says where the rows are: in this process, for the
kernels (`LocalBatch`) or for the dense reference (`DenseBatch`), or spread across ranks (`distributed.ShardedBatch`). A
loss is written with the methods of `Batch` and does not depend on the class. Columns, groups and sums include the rows
of all ranks.

Results are in the accumulation dtype: float64 for float64 embeddings, else float32. They are differentiable unless a
method says otherwise.
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
    """The rows of one call, and the reduction of its losses.

    Methods take rows u (M, D) that come from `unit_rows`, and ids (M,), the group of each row. inv_tau is 1 / tau: a
    number, or a tensor (M,) where a method says so.
    """

    def __init__(self, rows: Tensor, views: int, reduction: str, normalize: bool):
        self.first = rows  # (N, D), the first view
        self.views = views
        self.reduction = reduction
        self.normalize = normalize

    # --- rows and numbers -------------------------------------------------------------------------------------------

    def unit_rows(self, z: Tensor) -> Tensor:
        """Return embeddings (M, D) in the accumulation dtype, scaled to unit length if `normalize` is set."""
        return unit_rows(z, self.normalize)

    def inverse_temperature(self, temperature: float | Tensor, *, per_row: int | None = None) -> float | Tensor:
        """Check the temperature and return 1 / temperature. If `per_row` is given, a tensor (per_row,) with one
        temperature per row is accepted too."""
        return self._replicated(inverse_temperature(temperature, self.first, per_row=per_row))

    def logit_scale(self, logit_scale: float | Tensor, name: str = "logit_scale") -> float | Tensor:
        """Check a logit scale, which replaces 1 / temperature, and return it."""
        return self._replicated(logit_scale_factor(logit_scale, self.first, name))

    def factor(self, value: float | Tensor) -> float | Tensor:
        """Return any other number that multiplies logits, in the form that methods take. Its value is not checked."""
        return self._replicated(factor(value, self.first))

    def bias(self, value: float | Tensor, name: str = "bias") -> Tensor:
        """Check the bias, a number that is added to every logit, and return it as a 0-d tensor."""
        replicated = self._replicated(bias_of_logits(value, self.first, name))
        assert isinstance(replicated, Tensor)
        return replicated

    def _replicated(self, value: float | Tensor) -> float | Tensor:
        """Return the given number, which is the same on all ranks. In a group, its gradient becomes the mean of the
        ranks' gradients."""
        return value

    def beside(self, rows: Tensor) -> Batch:
        """Return a batch of further rows of the same call, such as explicit negatives or a teacher's features."""
        return type(self)(rows, 1, self.reduction, self.normalize)

    def in_tiles(self) -> Batch:
        """Return this batch, but with log-sum-exps whose logits equal the logits of `soft_dots` bit for bit."""
        return self

    @property
    def n_samples(self) -> int:
        """The number of samples in the batch."""
        return self.first.shape[0]

    def sample_ids(self) -> Tensor:
        """Return the index of each sample (N,)."""
        return torch.arange(self.first.shape[0], device=self.first.device)

    def row_ids(self) -> Tensor:
        """Return the index of each row of all views (M,)."""
        return torch.arange(self.views * self.first.shape[0], device=self.first.device)

    def as_compared(self, u: Tensor) -> Tensor:
        """Return the rows with the rounding that an exchange between ranks may apply. The gradient passes through
        unchanged."""
        return u

    def all_rows(self, u: Tensor) -> Tensor:
        """Return the rows of the whole batch, without a gradient if the batch is spread across ranks."""
        return u

    def gather(self, x: Tensor) -> Tensor:
        """Return the entries of x on all ranks. x (N, ...) has one entry per sample of this rank. The result has no
        gradient if the batch is spread across ranks."""
        return x

    # --- log-sum-exps -----------------------------------------------------------------------------------------------

    def neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, limits: Tensor | None = None) -> Tensor:
        """Return nu_i = log sum over {j : id_j != id_i} of exp(u_i . u_j / tau) (M,), with one temperature or one per
        row.

        With one temperature per row, 1/tau multiplies u_i but not u_j. The logits are then not symmetric, so all of
        them are formed, at twice the cost.

        limits: the largest similarity that the sum of each row includes (M,), a constant.
        """
        if is_per_row(inv_tau):
            return self.neg_lse_to(Side(u, ids, limits), Side(u, ids), inv_tau)
        if limits is not None:
            return self._limited_neg_lse(Side(u, ids, limits), None, inv_tau, self, both=False)[0]
        return self._neg_lse(u, ids, inv_tau)

    def neg_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor, *, beside: Batch | None = None) -> Tensor:
        """Return nu of the rows against the columns (M,), with one temperature or one per row.

        The columns are rows of this batch, or of the batch `beside`.
        """
        if is_per_row(inv_tau):
            limits = None if rows.limits is None else rows.limits * inv_tau.detach()
            rows, inv_tau = Side(rows.u * inv_tau.unsqueeze(1), rows.ids, limits), 1.0
        if rows.limits is not None:
            return self._limited_neg_lse(rows, _unlimited(cols), inv_tau, beside or self, both=False)[0]
        return self._neg_lse_to(rows, cols, inv_tau, beside or self)

    def limited_cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return `cross_neg_lse` for two sides with limits."""
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
        """Return nu of the rows against the columns (M,) and of the columns against the rows (K,), from one pass."""

    @abstractmethod
    def neg_lse_to_held(self, rows: Side, cols: Side, inv_tau: float | Tensor, held: Tensor | None = None) -> Tensor:
        """Return nu of the rows (M,) against columns that every rank holds in full, such as a queue or a memory bank.

        held: the number of leading columns that count, a 0-d integer tensor in host memory; None: all.
        """

    @abstractmethod
    def guided_neg_lse(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide, *, beside: Batch | None = None
    ) -> Tensor:
        """Return nu of the rows (M,) against the columns that the guide does not exclude.

        The columns are rows of this batch, or of the batch `beside`.
        """

    def held_loss(
        self, rows: Side, cols: Side, inv_tau: float | Tensor, pos: Tensor, held: Tensor | None = None
    ) -> Tensor:
        """Return log(1 + exp(nu - pos)) of the rows against columns as in `neg_lse_to_held`, reduced."""
        return self.reduce(row_losses(self.neg_lse_to_held(rows, cols, inv_tau, held), pos))

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return nu and pi, the logit with the other view, for every row of two views: (2N,) each."""
        u_i, u_j = self.unit_rows(z_i), self.unit_rows(z_j)
        pos = inv_tau * row_dots(u_i, u_j)
        return self._neg_lse(torch.cat((u_i, u_j)), self.sample_ids().repeat(2), inv_tau), pos.repeat(2)

    # --- positives and groups ---------------------------------------------------------------------------------------

    def all_dots(self, u: Tensor, v: Tensor, *, beside: Batch | None = None) -> Tensor:
        """Return u_i . (the sum of all rows v) (M,), with v of this batch or of the batch `beside`."""
        return row_dots(u, v.sum(dim=0).expand_as(u))

    def group_dots(self, u: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        """Return u_i . (the sum of the rows v with the same id, v_i included) (M,)."""
        return row_dots(u, sums_of_groups(v, ids, ids))

    def positive_dots(self, u: Tensor, ids: Tensor) -> Tensor:
        """Return u_i . (the sum of the other rows with the same id) (M,)."""
        return row_dots(u, sums_of_groups(u, ids, ids) - u)

    def group_counts(self, ids: Tensor) -> Tensor:
        """Return, for each row, how many rows have its id, including the row itself (M,)."""
        return counts_of_groups(ids, ids)

    @abstractmethod
    def positive_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor) -> Tensor:
        """Return the log-sum-exp of each row's logits with the other rows of its id (M,); -inf if there are none."""

    def positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor:
        """Return the log-sum-exp of each row's logits with the columns of its id (M,), with one temperature or one per
        row; -inf if there are none."""
        if is_per_row(inv_tau):
            rows, inv_tau = Side(rows.u * inv_tau.unsqueeze(1), rows.ids), 1.0
        return self._positive_lse_to(rows, cols, inv_tau)

    @abstractmethod
    def _positive_lse_to(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> Tensor: ...

    @abstractmethod
    def positive_sum(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, nu: Tensor) -> Tensor:
        """Return, for each row, the sum of log(1 + exp(nu - logit)) over the other rows with its id (M,)."""

    @abstractmethod
    def softplus_sums(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: Tensor, *, positives: bool
    ) -> Tensor:
        """Return the sum of log(1 + exp(u_i . v_j / tau + b)) over the rows or columns j of other groups (M,).

        Without columns the rows are compared with each other. With columns and `positives`, the result also includes
        the sum of log(1 + exp(-u_i . v_j / tau - b)) over the columns of the same group.
        """

    @abstractmethod
    def called_neg_lse(
        self, similarities: Callable[[Tensor, Tensor], Tensor], inv_tau: float | Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return nu of the images, nu of the texts and the logits of the pairs, (N,) each, without a gradient.

        The similarities come from a function of sample indices (`sample_ids`), and have the given dtype.
        """

    @abstractmethod
    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        """Return the teacher's expectations of u_i . v_j over the pairs of different groups, per row and per column.

        A row's expectation (M,) is the sum over the columns of p_ij u_i . v_j, where p_ij is the teacher's softmax of
        row i over all columns. A column's expectation (K,) is the sum over the rows, with the teacher's softmax of the
        column over all rows.
        """

    # --- sums and losses --------------------------------------------------------------------------------------------

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of the entries of all ranks (0-d)."""
        return x.sum()

    def sum_of_ranks(self, x: Tensor) -> Tensor:
        """Return the sum of x across all ranks. x, of any shape, is a sum over this rank's rows."""
        return x

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Return log of the sum of exp(x) over all rows (0-d), without a gradient."""
        return x.detach().logsumexp(dim=0)

    def reduce(self, losses: Tensor, counted: Tensor | None = None) -> Tensor:
        """Return the losses, their sum or their mean, as `reduction` says.

        counted: the mean covers only the rows where `counted` is True, and is 0 if there are no such rows. The losses
        of the other rows are 0 already.
        """
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return self.total(losses)
        wide = in_double(losses)  # the sum may overflow float32 even if the mean does not
        if counted is None:
            return self._mean(wide).to(losses.dtype)
        return (self.total(wide) / self.total(counted).clamp_min(1)).to(losses.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        return x.mean()

    def limited_nt_xent_at_once(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, limit_scale: float, limit_shift: float
    ) -> Tensor | None:
        """Return the reduced NT-Xent with limits from one call that also forms its gradient, or None if there is no
        such call.

        The sum of a row includes the negatives whose similarity is at most limit_scale * s_pos + limit_shift, where
        s_pos is the row's similarity to its positive.
        """
        return None

    def nt_xent(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor) -> Tensor:
        """Return log(1 + exp(nu - pi)) of the rows of two views, reduced."""
        return self.reduce(row_losses(*self.nt_xent_rows(z_i, z_j, inv_tau)))

    def info_nce_at_once(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, *, both: bool) -> Tensor | None:
        """Return the reduced InfoNCE from one call that also forms its gradient, or None if there is no such call.

        Queries z_i pick their keys z_j among the keys of all samples; with `both` the loss is half the sum of both
        directions.
        """
        return None

    def sigmoid_at_once(
        self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, bias: Tensor, *, two_views: bool
    ) -> Tensor | None:
        """Return the reduced SigLIP of pairs, or NT-Logistic if `two_views`, from one call that also forms its
        gradient, or None if there is no such call."""
        return None

    def soft_dots_at_once(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> Tensor | None:
        """Return the sum of all expectations of `soft_dots` (0-d) from one call that also forms its gradient, or None
        if there is no such call."""
        return None

    def sup_con_at_once(self, z: Tensor, ids: Tensor, inv_tau: float | Tensor, form: str) -> Tensor | None:
        """Return the reduced SupCon of embeddings (M, D) from one call that also forms its gradient, or None if there
        is no such call."""
        return None

    def neg_lse_less(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, mean: Tensor, counted: Tensor) -> Tensor:
        """Return nu - mean for the counted rows and 0 for the other rows, reduced over the counted rows."""
        losses = self.neg_lse(u, ids, inv_tau) - mean
        return self.reduce(losses.masked_fill(~counted, 0), counted=counted)

    def weighted_neg_lse(self, u: Tensor, ids: Tensor, inv_tau: float | Tensor, weights: Tensor) -> Tensor:
        """Return sum_i weights_i nu_i (0-d) over this rank's rows whose nu is not -inf, without a gradient for the
        weights."""
        return weighted_sum(self.neg_lse(u, ids, inv_tau), weights)


def _unlimited(side: Side) -> Side:
    return side._replace(limits=torch.full_like(side.u[:, 0], torch.inf).detach())


class LocalBatch(Batch):
    """A batch whose rows are all in this process, for the kernels of a backend."""

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
        # The loss is linear in nu, so one call forms its value and its gradient.
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
    """A batch whose rows are all in this process, for the reference: plain PyTorch that holds every similarity."""

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
