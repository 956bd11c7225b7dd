"""The dense oracle: the M x M logits, held whole, in plain differentiable PyTorch.

It is the only truth of the project, and is itself held against an independent NumPy loop. Autograd goes through it
rather than through a hand-written backward, so its gradients are no relatives of the kernels', and it may be
differentiated any number of times. Float64 in gives float64 throughout; narrower input is computed in float32.
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
        """The sum of log(1 + exp(x)), x = logit + bias, over the rows of other groups (M,), among themselves or against
        columns; `positives`: and of log(1 + exp(-x)) over those of the same group."""
        dtype, of_cols = accumulation_dtype(rows.u.dtype), rows if cols is None else cols
        x = inv_tau * product(rows.u.to(dtype), of_cols.u.to(dtype).T) + bias
        agree = rows.ids[:, None] == of_cols.ids
        values = -F.logsigmoid(torch.where(agree, x, -x))
        return values.sum(dim=1) if positives else values.masked_fill(agree, 0).sum(dim=1)

    def called_neg_lse(
        self, similarities: Tensor, ids: Tensor, inv_tau: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """nu of rows and of columns, and the logits of the diagonal, of similarities (M, M) as they are given."""
        logits, apart = inv_tau * similarities, ids[:, None] != ids
        return _masked_logsumexp(logits, apart), _masked_logsumexp(logits.T, apart), logits.diagonal()

    def soft_dots(self, rows: Side, cols: Side, teacher: Teacher | CalledTeacher) -> tuple[Tensor, Tensor]:
        """Sums of u_i . v_j weighted by the teacher's softmax, over the columns of other groups (M,) and over the rows
        (K,)."""
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
        """nu of the rows (M,) over the columns of other groups that are not above the guide's limits."""
        left_out = (guide.rows @ guide.cols.T > guide.limits[:, None]) | (rows.ids[:, None] == cols.ids)
        return _masked_logsumexp(inv_tau * product(rows.u, cols.u.T), ~left_out)

    def positive_lse(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, *, same: bool
    ) -> Tensor:
        """Log-sum-exp of each row's logits with the columns of its id (M,), but for its own where v is u."""
        return _masked_logsumexp(*_positives(u, v, u_ids, v_ids, inv_tau, same))

    def positive_sum(
        self, u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, nu: Tensor, *, same: bool
    ) -> Tensor:
        """The sum over them of log(1 + exp(nu - logit)) (M,)."""
        logits, mask = _positives(u, v, u_ids, v_ids, inv_tau, same)
        return torch.where(mask, -F.logsigmoid(logits - nu[:, None]), 0).sum(dim=1)


def _counted(sims: Tensor, rows: Side, col_ids: Tensor) -> Tensor:
    """Which columns each row counts: those of other groups, and not beyond its limit."""
    apart = rows.ids[:, None] != col_ids
    return apart if rows.limits is None else apart & ~(sims > rows.limits[:, None])


def _positives(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, same: bool
) -> tuple[Tensor, Tensor]:
    """All logits, and which of them are of positive pairs."""
    mask = u_ids[:, None] == v_ids
    if same:
        mask = mask.fill_diagonal_(False)
    dtype = accumulation_dtype(u.dtype)
    return inv_tau * product(u.to(dtype), v.to(dtype).T), mask


def _masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """log of the sum of exp(logits) over each row where mask is True; -inf, with no gradient, where it never is."""
    some = mask.any(dim=1)
    # A row without a term keeps its logits and gets its -inf afterwards: logsumexp's gradient at -inf is NaN.
    logits = torch.where(mask | ~some[:, None], logits, -torch.inf)
    return torch.where(some, torch.logsumexp(logits, dim=1), -torch.inf)


BACKEND = ReferenceBackend()
