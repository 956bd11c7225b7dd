"""The dense oracle: plain differentiable PyTorch on the full M x M matrix of logits.

Every other backend is tested against this one, and this one is tested against an independent NumPy loop. Its gradients
come from autograd. So they are independent of the kernels' gradients, and the results can be differentiated any number
of times. The only hand-written backward is the backward of a matrix product (`algebra.product`). float64 inputs are
computed in float64, narrower inputs in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algebra import accumulation_dtype, product, unit_rows
from ..sides import CalledTeacher, Guide, Side, Teacher
from .base import Backend


class ReferenceBackend(Backend):
    def neg_lse(self, rows: Side, inv_tau: float | Tensor) -> Tensor:
        u = rows.u.to(accumulation_dtype(rows.u.dtype))
        sims = product(u, u.T)
        return _masked_logsumexp(inv_tau * sims, _counted(sims, rows, rows.ids))

    def cross_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(rows.u.dtype)
        sims = product(rows.u.to(dtype), cols.u.to(dtype).T)
        of_rows, of_cols = _counted(sims, rows, cols.ids), _counted(sims.T, cols, rows.ids)
        return _masked_logsumexp(inv_tau * sims, of_rows), _masked_logsumexp(inv_tau * sims.T, of_cols)

    def nt_xent_rows(self, z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
        n_samples = z_i.shape[0]
        u = unit_rows(torch.cat((z_i, z_j)), normalize)
        row = torch.arange(2 * n_samples, device=u.device)
        sample, partner = row % n_samples, (row + n_samples) % (2 * n_samples)
        logits = inv_tau * product(u, u.T)
        pos = logits.gather(1, partner[:, None]).squeeze(1)
        return _masked_logsumexp(logits, sample[:, None] != sample), pos

    def softplus(
        self, rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: float | Tensor, *, positives: bool
    ) -> Tensor:
        """Return each row's sum of log(1 + exp(x)) over columns of other groups (M,), where x = logit + bias.

        Without `cols` the rows are compared among themselves. With `positives` the sum includes log(1 + exp(-x)) over
        columns of the same group.
        """
        dtype, of_cols = accumulation_dtype(rows.u.dtype), rows if cols is None else cols
        x = inv_tau * product(rows.u.to(dtype), of_cols.u.to(dtype).T) + bias
        agree = rows.ids[:, None] == of_cols.ids
        values = -F.logsigmoid(torch.where(agree, x, -x))
        return values.sum(dim=1) if positives else values.masked_fill(agree, 0).sum(dim=1)

    def called_neg_lse(
        self, similarities: Tensor, ids: Tensor, inv_tau: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return nu of rows, nu of columns, and the diagonal of the logits, for given similarities (M, M)."""
        logits, apart = inv_tau * similarities, ids[:, None] != ids
        return _masked_logsumexp(logits, apart), _masked_logsumexp(logits.T, apart), logits.diagonal()

    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        """Return the sums of u_i . v_j, weighted by the teacher's softmax, over columns (M,) and over rows (K,).

        Only pairs of different groups count.
        """
        if isinstance(teacher, CalledTeacher):
            similarities = teacher.similarities(rows.ids, cols.ids)
        else:
            similarities = teacher.rows @ teacher.cols.T
        logits, agree = teacher.inv_tau * similarities, rows.ids[:, None] == cols.ids
        sims = product(rows.u, cols.u.T).masked_fill(agree, 0)
        of_rows, of_cols = (
            torch.exp((logits - lse).clamp_max(0)) for lse in (teacher.rows_lse[:, None], teacher.cols_lse)
        )
        return (of_rows * sims).sum(dim=1), (of_cols * sims).sum(dim=0)

    def guided_neg_lse(self, rows: Side, cols: Side, inv_tau: float | Tensor, guide: Guide) -> Tensor:
        """Return nu of the rows (M,) over columns of other groups whose guide similarity is within the row's limit."""
        left_out = (guide.rows @ guide.cols.T > guide.limits[:, None]) | (rows.ids[:, None] == cols.ids)
        return _masked_logsumexp(inv_tau * product(rows.u, cols.u.T), ~left_out)

    def positive_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, *, same: bool
    ) -> Tensor:
        """Return each row's log-sum-exp over the columns with its id (M,), except the row itself if `same`."""
        return _masked_logsumexp(*_positives(u, v, u_ids, v_ids, inv_tau, same))

    def positive_sum(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, nu: Tensor, *, same: bool
    ) -> Tensor:
        """Return each row's sum of log(1 + exp(nu - logit)) over the same columns as `positive_lse` (M,)."""
        logits, mask = _positives(u, v, u_ids, v_ids, inv_tau, same)
        return torch.where(mask, -F.logsigmoid(logits - nu[:, None]), 0).sum(dim=1)


def _counted(sims: Tensor, rows: Side, col_ids: Tensor) -> Tensor:
    """Return the mask of the columns that count for each row: columns of other groups, up to the row's limit."""
    apart = rows.ids[:, None] != col_ids
    return apart if rows.limits is None else apart & ~(sims > rows.limits[:, None])


def _positives(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, same: bool
) -> tuple[Tensor, Tensor]:
    """Return all logits, and the mask of the positive pairs."""
    mask = u_ids[:, None] == v_ids
    if same:
        mask = mask.fill_diagonal_(False)
    dtype = accumulation_dtype(u.dtype)
    return inv_tau * product(u.to(dtype), v.to(dtype).T), mask


def _masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """Return each row's log-sum-exp over the entries in `mask`. A row without entries gets -inf, without a gradient."""
    some = mask.any(dim=1)
    # A row without entries keeps its logits here, and the last line sets its result to -inf. If all of its logits were
    # -inf, the gradient of logsumexp would be NaN.
    logits = torch.where(mask | ~some[:, None], logits, -torch.inf)
    return torch.where(some, torch.logsumexp(logits, dim=1), -torch.inf)


BACKEND = ReferenceBackend()
