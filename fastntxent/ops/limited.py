"""Log-sum-exps that exclude similarities above each row's limit, and NT-Xent with such limits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..algebra import accumulation_dtype
from ..backends.base import Upstream
from ..sides import Side
from .contract import checked
from .register import call_kernel, may_be_differentiated, register, save, saved
from .scalar import register_scalar_path


def limited_neg_lse(rows: Side, cols: Side | None, inv_tau: float | Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return nu of the rows (M,) and of the columns (K,), without the similarities above a row's or a column's limit.

    Without columns the rows are compared among themselves, and the second result is empty. Differentiable in the rows,
    the columns and inv_tau; the limits are constants.
    """
    of_cols = rows if cols is None else cols
    u, u_ids, u_limits = rows
    v, v_ids, v_limits = of_cols
    assert u_limits is not None
    assert v_limits is not None
    return _limited_neg_lse(u, v, u_ids, v_ids, u_limits, v_limits, inv_tau, cols is None, backend)


def limited_nt_xent_scalar(
    z_i: Tensor,
    z_j: Tensor,
    inv_tau: float | Tensor,
    normalize: bool,
    limit_scale: float,
    limit_shift: float,
    mean: bool,
    backend: str,
) -> Tensor:
    """Return NT-Xent with limited negatives, as a sum or a mean, differentiable in both views and inv_tau.

    A negative counts if its similarity to the row is at most limit_scale times the similarity of the row and its
    positive, plus limit_shift.
    """
    call = _limited_nt_xent_scalar if may_be_differentiated(z_i, z_j, inv_tau) else _limited_nt_xent_value
    return call(z_i, z_j, inv_tau, normalize, limit_scale, limit_shift, mean, backend)


_limited_nt_xent_scalar, _limited_nt_xent_value = register_scalar_path(
    "limited_nt_xent", "bool normalize, float limit_scale, float limit_shift, bool mean"
)


def run_limited_neg_lse(
    rows: Side, cols: Side | None, inv_tau: float | Tensor, backend: str
) -> tuple[Tensor, Tensor | None]:
    """Check the tensors. Return nu of the rows and nu of the columns (None if there are no columns)."""
    v, v_ids, v_limits = rows if cols is None else cols
    assert rows.limits is not None
    assert v_limits is not None
    u, v, u_ids, v_ids, u_limits, v_limits, k = checked(
        "limited_neg_lse", rows.u, v, rows.ids, v_ids, rows.limits, v_limits, inv_tau
    )
    sides = Side(u, u_ids, u_limits), None if cols is None else Side(v, v_ids, v_limits)
    nu_rows, nu_cols = call_kernel(backend, "limited_neg_lse", u, *sides, k)
    return nu_rows, nu_cols


def run_limited_neg_lse_backward(
    rows: Side, cols: Side | None, inv_tau: float | Tensor, of_rows: Upstream, of_cols: Upstream, backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Check the tensors. Return the gradients with respect to rows, columns (None where not wanted) and inv_tau."""
    v, v_ids, v_limits = rows if cols is None else cols
    assert rows.limits is not None
    assert v_limits is not None
    d_rows, d_cols, u, v, u_ids, v_ids, u_limits, v_limits, k, nu_rows, nu_cols = checked(
        "limited_neg_lse_backward", of_rows.d_neg_lse, of_cols.d_neg_lse, rows.u, v, rows.ids, v_ids, rows.limits,
        v_limits, inv_tau, of_rows.neg_lse, of_cols.neg_lse,
    )  # fmt: skip
    sides = Side(u, u_ids, u_limits), None if cols is None else Side(v, v_ids, v_limits)
    upstreams = Upstream(d_rows, nu_rows, of_rows.wanted), Upstream(d_cols, nu_cols, of_cols.wanted)
    d_u, d_v, d_k = call_kernel(backend, "limited_neg_lse_backward", u, *sides, k, *upstreams)
    return d_u, d_v, d_k


def _sides(tensors: tuple[Any, ...], same: bool) -> tuple[Side, Side | None]:
    u, v, u_ids, v_ids, u_limits, v_limits = tensors
    return Side(u, u_ids, u_limits), None if same else Side(v, v_ids, v_limits)


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, inv_tau, same, backend = given
    nu_rows, nu_cols = run_limited_neg_lse(*_sides(tuple(tensors), same), inv_tau, backend)
    return nu_rows, nu_rows.new_empty(0) if nu_cols is None else nu_cols


def _fake(u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype, same = accumulation_dtype(u.dtype), rest[-2]
    return u.new_empty(u.shape[0], dtype=dtype), v.new_empty(0 if same else v.shape[0], dtype=dtype)


def _setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.same, ctx.backend = inputs
    save(ctx, *tensors, *output)


def _autograd(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not ctx.same
    *tensors, nu_rows, nu_cols = saved(ctx)
    if ctx.same:
        d_cols, nu_cols = d_rows, nu_rows
    d_u, d_v, d_inv_tau = _limited_neg_lse_backward(
        d_rows, d_cols, *tensors, nu_rows, nu_cols, ctx.same, needs_u, needs_v, ctx.backend
    )
    return d_u if needs_u else None, d_v if needs_v else None, *[None] * 4, d_inv_tau, None, None


def _backward(d_rows: Tensor, d_cols: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, inv_tau, nu_rows, nu_cols, same, needs_u, needs_v, backend = given
    u, v = tensors[:2]
    upstreams = Upstream(d_rows, nu_rows, needs_u), Upstream(d_cols, nu_cols, needs_v)
    d_u, d_v, d_inv_tau = run_limited_neg_lse_backward(*_sides(tuple(tensors), same), inv_tau, *upstreams, backend)
    return (
        u.new_empty(0) if d_u is None else d_u.to(u.dtype),
        v.new_empty(0) if d_v is None else d_v.to(v.dtype),
        d_inv_tau,
    )


def _backward_fake(d_rows: Tensor, d_cols: Tensor, u: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_u, needs_v, _ = rest[-3:]
    return u.new_empty(u.shape if needs_u else 0), v.new_empty(v.shape if needs_v else 0), d_rows.new_empty(())


_TENSORS = "Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor u_limits, Tensor v_limits, Tensor inv_tau"
_limited_neg_lse_backward = register(
    f"limited_neg_lse_backward(Tensor d_rows, Tensor d_cols, {_TENSORS}, Tensor rows_neg_lse, Tensor cols_neg_lse,"
    " bool same, bool needs_u, bool needs_v, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_limited_neg_lse = register(
    f"limited_neg_lse({_TENSORS}, bool same, str backend) -> (Tensor, Tensor)", _forward, _fake, _setup, _autograd
)
