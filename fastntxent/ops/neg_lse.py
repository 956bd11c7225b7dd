"""The primitive: log-sum-exp over the rows of other groups, of one set of rows or between two."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.base import accumulation_dtype
from ..backends.reference import BACKEND as _REFERENCE
from .register import autocast_off, kernels, register


def neg_lse(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    """nu of the rows (M,), differentiable in u and inv_tau."""
    if backend == "reference":
        with autocast_off(u):
            return _REFERENCE.neg_lse(u, ids, inv_tau)
    return _neg_lse(u, ids, inv_tau, backend)


def cross_neg_lse(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """nu of the rows (M,) against the columns and of the columns (K,) against the rows, differentiable in u, v and
    inv_tau."""
    if backend == "reference":
        with autocast_off(u):
            return _REFERENCE.cross_neg_lse(u, v, u_ids, v_ids, inv_tau)
    return _cross_neg_lse(u, v, u_ids, v_ids, inv_tau, backend)


# --- one set of rows -------------------------------------------------------------------------------------------------


def _forward(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    with autocast_off(u):
        return kernels(backend, u, inv_tau).neg_lse(u, ids, inv_tau)


def _fake(u: Tensor, ids: Tensor, inv_tau: Tensor, backend: str) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _autograd(ctx: Any, d_neg_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_inv_tau = _neg_lse_backward(d_neg_lse, *ctx.saved_tensors, ctx.backend)
    return d_u, None, d_inv_tau, None


def _backward(
    d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    with autocast_off(u):
        d_u, d_inv_tau = kernels(backend, u, inv_tau).neg_lse_backward(d_neg_lse, u, ids, inv_tau, neg_lse)
        return d_u.to(u.dtype), d_inv_tau


def _backward_fake(
    d_neg_lse: Tensor, u: Tensor, ids: Tensor, inv_tau: Tensor, neg_lse: Tensor, backend: str
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

# --- rows against columns --------------------------------------------------------------------------------------------


def _cross_forward(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    with autocast_off(u):
        return kernels(backend, u, inv_tau).cross_neg_lse(u, v, u_ids, v_ids, inv_tau)


def _cross_fake(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, inv_tau: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(u.dtype)
    return u.new_empty(u.shape[0], dtype=dtype), v.new_empty(v.shape[0], dtype=dtype)


def _cross_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output)


def _cross_autograd(ctx: Any, d_rows: Tensor, d_cols: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    d_u, d_v, d_inv_tau = _cross_neg_lse_backward(d_rows, d_cols, *ctx.saved_tensors, needs_u, needs_v, ctx.backend)
    return d_u if needs_u else None, d_v if needs_v else None, None, None, d_inv_tau, None


def _cross_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with autocast_off(u):
        d_u, d_v, d_inv_tau = kernels(backend, u, inv_tau).cross_neg_lse_backward(
            d_rows, d_cols, u, v, u_ids, v_ids, inv_tau, rows_neg_lse, cols_neg_lse, needs_u, needs_v
        )
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
