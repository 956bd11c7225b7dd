"""Checked calls of the kernels of `neg_lse`, `neg_lse_sum` and `cross_neg_lse`.

An operator's schema and its contract are flat lists of tensors, but a backend's methods (backends/base.py) take one
record per side. These functions convert between the two.
"""

from __future__ import annotations

from torch import Tensor

from ..backends.base import Upstream
from ..sides import Side
from .contract import checked
from .register import call_kernel


def run_neg_lse(rows: Side, inv_tau: float | Tensor, backend: str) -> Tensor:
    """Return nu of the rows (M,)."""
    u, ids, k = checked("neg_lse", rows.u, rows.ids, inv_tau)
    nu: Tensor = call_kernel(backend, "neg_lse", u, Side(u, ids), k)
    return nu


def run_neg_lse_backward(
    rows: Side, inv_tau: float | Tensor, upstream: Upstream, backend: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the rows and inv_tau."""
    d_nu, u, ids, k, nu = checked("neg_lse_backward", upstream.d_neg_lse, rows.u, rows.ids, inv_tau, upstream.neg_lse)
    d_u, d_k = call_kernel(backend, "neg_lse_backward", u, Side(u, ids), k, Upstream(d_nu, nu))
    return d_u, d_k


def run_neg_lse_sum(
    rows: Side, inv_tau: float | Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted sum of nu, and its gradients with respect to the rows and inv_tau."""
    u, ids, k, w = checked("neg_lse_sum", rows.u, rows.ids, inv_tau, weights)
    total, d_u, d_k = call_kernel(backend, "neg_lse_sum", u, Side(u, ids), k, w)
    return total, d_u, d_k


def run_cross_neg_lse(rows: Side, cols: Side, inv_tau: float | Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return nu of the rows (M,) and of the columns (K,)."""
    u, v, u_ids, v_ids, k = checked("cross_neg_lse", rows.u, cols.u, rows.ids, cols.ids, inv_tau)
    nu_rows, nu_cols = call_kernel(backend, "cross_neg_lse", u, Side(u, u_ids), Side(v, v_ids), k)
    return nu_rows, nu_cols


def run_cross_neg_lse_backward(
    rows: Side, cols: Side, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream, backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return the gradients with respect to the rows, the columns (None where not wanted) and inv_tau."""
    (d_rows, nu_rows, wants_rows), (d_cols, nu_cols, wants_cols) = of_rows, of_cols
    d_rows, d_cols, u, v, u_ids, v_ids, k, nu_rows, nu_cols = checked(
        "cross_neg_lse_backward", d_rows, d_cols, rows.u, cols.u, rows.ids, cols.ids, inv_tau, nu_rows, nu_cols
    )
    of_rows, of_cols = Upstream(d_rows, nu_rows, wants_rows), Upstream(d_cols, nu_cols, wants_cols)
    d_u, d_v, d_k = call_kernel(
        backend, "cross_neg_lse_backward", u, Side(u, u_ids), Side(v, v_ids), k, of_rows, of_cols
    )
    return d_u, d_v, d_k
