"""The primitive: each row's log-sum-exp over the rows of other groups, within one set of rows or between two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, weighted_sum
from ..backends.base import Upstream
from ..sides import Side
from .contract import checked
from .kernels import (
    run_cross_neg_lse,
    run_cross_neg_lse_backward,
    run_neg_lse,
    run_neg_lse_backward,
    run_neg_lse_sum,
)
from .register import may_be_differentiated, register, save, save_gradients, saved, scaled


def neg_lse(u: Tensor, ids: Tensor, inv_tau: float | Tensor, backend: str) -> Tensor:
    """Return nu of the rows (M,), differentiable in u and inv_tau."""
    return _neg_lse(u, ids, inv_tau, backend)


def neg_lse_sum(u: Tensor, ids: Tensor, inv_tau: float | Tensor, weights: Tensor, backend: str) -> Tensor:
    """Return sum_i weights_i nu_i (0-d) over the rows that have a negative, differentiable in u and inv_tau.

    The weights are known in the forward, so the value and, if needed, the gradient come from one call.
    """
    if not may_be_differentiated(u, inv_tau):
        return weighted_sum(neg_lse(u, ids, inv_tau, backend), weights)
    return _neg_lse_sum(u, ids, inv_tau, weights, backend)


def cross_neg_lse(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Return nu of the rows (M,) against the columns, and nu of the columns (K,) against the rows.

    Differentiable in u, v and inv_tau.
    """
    return _cross_neg_lse(u, v, u_ids, v_ids, inv_tau, backend)


# --- one set of rows -------------------------------------------------------------------------------------------------


def _forward(u: Tensor, ids: Tensor, inv_tau: float | Tensor, backend: str) -> Tensor:
    return run_neg_lse(Side(u, ids), inv_tau, backend)


def _fake(u: Tensor, ids: Tensor, inv_tau: float | Tensor, backend: str) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    save(ctx, *tensors, output)


def _autograd(ctx: Any, d_neg_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_inv_tau = _neg_lse_backward(d_neg_lse, *saved(ctx), ctx.backend)
    return d_u, None, d_inv_tau, None


def _backward(
    d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: float | Tensor, neg_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    d_u, d_inv_tau = run_neg_lse_backward(Side(u, ids), inv_tau, Upstream(d_neg_lse, neg_lse), backend)
    return d_u.to(u.dtype), d_inv_tau


def _backward_fake(
    d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: float | Tensor, neg_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), d_neg_lse.new_empty(())


_neg_lse_backward = register(
    "neg_lse_backward(Tensor d_neg_lse, Tensor u, Tensor ids, Tensor inv_tau, Tensor neg_lse, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_neg_lse = register(
    "neg_lse(Tensor u, Tensor ids, Tensor inv_tau, str backend) -> Tensor", _forward, _fake, _setup, _autograd
)

# --- a weighted sum over one set of rows, with its gradient ----------------------------------------------------------


def _weighted_forward(
    u: Tensor, ids: Tensor, inv_tau: float | Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return run_neg_lse_sum(Side(u, ids), inv_tau, weights, backend)


def scalar_path_fake(u: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return fake outputs of a scalar path: a value, and its gradients with respect to u and inv_tau."""
    dtype = accumulation_dtype(u.dtype)
    return u.new_empty((), dtype=dtype), u.new_empty(u.shape, dtype=dtype), u.new_empty((), dtype=dtype)


def _weighted_setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    u, _, inv_tau, *_ = inputs
    save_gradients(ctx, output[1:], u, inv_tau)


def _weighted_autograd(ctx: Any, d_sum: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    d_u, d_inv_tau = scaled_scalar_path(ctx, d_sum)
    return d_u, None, d_inv_tau, None, None


def scaled_scalar_path(ctx: Any, d_value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the saved gradients with respect to the rows and inv_tau, multiplied by the upstream gradient."""
    if d_value is None:  # no upstream gradient
        return None, None
    # Use the registered operator only if this backward may be differentiated; otherwise scale the gradients here.
    if torch.is_grad_enabled():
        d_u, d_inv_tau = _neg_lse_sum_backward(d_value, *saved(ctx))
        return d_u, d_inv_tau
    d_u, d_inv_tau, u, _ = ctx.saved_tensors
    return scaled(d_value, d_u, u), d_value * d_inv_tau if ctx.needs_input_grad[2] else None


def _weighted_backward(
    d_sum: Tensor, d_u: Tensor, d_inv_tau: Tensor, u: Tensor, inv_tau: float | Tensor
) -> tuple[Tensor, Tensor]:
    d_sum, d_u, d_inv_tau, u, _ = checked("neg_lse_sum_backward", d_sum, d_u, d_inv_tau, u, inv_tau)
    return scaled(d_sum, d_u, u), d_sum * d_inv_tau


def _weighted_backward_fake(
    d_sum: Tensor, d_u: Tensor, d_inv_tau: Tensor, u: Tensor, inv_tau: float | Tensor
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(d_inv_tau)


_neg_lse_sum_backward = register(
    "neg_lse_sum_backward(Tensor d_sum, Tensor d_u, Tensor d_inv_tau, Tensor u, Tensor inv_tau) -> (Tensor, Tensor)",
    _weighted_backward,
    _weighted_backward_fake,
)
_neg_lse_sum = register(
    "neg_lse_sum(Tensor u, Tensor ids, Tensor inv_tau, Tensor weights, str backend) -> (Tensor, Tensor, Tensor)",
    _weighted_forward,
    scalar_path_fake,
    _weighted_setup,
    _weighted_autograd,
    value_alone=True,
)

# --- rows against columns --------------------------------------------------------------------------------------------


def _cross_forward(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return run_cross_neg_lse(Side(u, u_ids), Side(v, v_ids), inv_tau, backend)


def _cross_fake(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: float | Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(u.dtype)
    return u.new_empty(u.shape[0], dtype=dtype), v.new_empty(v.shape[0], dtype=dtype)


def _cross_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    save(ctx, *tensors, *output)


def _cross_autograd(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    d_u, d_v, d_inv_tau = _cross_neg_lse_backward(d_rows, d_cols, *saved(ctx), needs_u, needs_v, ctx.backend)
    return d_u if needs_u else None, d_v if needs_v else None, None, None, d_inv_tau, None


def _cross_backward(
    d_rows: Tensor,
    d_cols: Tensor,
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: float | Tensor,
    rows_neg_lse: Tensor,
    cols_neg_lse: Tensor,
    needs_u: bool,
    needs_v: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_rows, of_cols = Upstream(d_rows, rows_neg_lse, needs_u), Upstream(d_cols, cols_neg_lse, needs_v)
    d_u, d_v, d_inv_tau = run_cross_neg_lse_backward(Side(u, u_ids), Side(v, v_ids), inv_tau, of_rows, of_cols, backend)
    return (
        u.new_empty(0) if d_u is None else d_u.to(u.dtype),
        v.new_empty(0) if d_v is None else d_v.to(v.dtype),
        d_inv_tau,
    )


def _cross_backward_fake(
    d_rows: Tensor, d_cols: Tensor, u: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_u, needs_v, _ = rest[-3:]
    return (
        u.new_empty(u.shape if needs_u else 0),
        v.new_empty(v.shape if needs_v else 0),
        d_rows.new_empty(()),
    )


_cross_neg_lse_backward = register(
    "cross_neg_lse_backward(Tensor d_rows, Tensor d_cols, Tensor u, Tensor v, Tensor u_ids, Tensor v_ids,"
    " Tensor inv_tau, Tensor rows_neg_lse, Tensor cols_neg_lse, bool needs_u, bool needs_v, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _cross_backward,
    _cross_backward_fake,
)
_cross_neg_lse = register(
    "cross_neg_lse(Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, str backend) -> (Tensor, Tensor)",
    _cross_forward,
    _cross_fake,
    _cross_setup,
    _cross_autograd,
)
