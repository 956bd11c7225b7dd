"""Sums of softplus over pairs, and the losses built from them: SigLIP for two towers, NT-Logistic for two views."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..algebra import accumulation_dtype
from ..backends.base import PairSums, SumWeights
from ..sides import Side
from .contract import checked
from .register import call_kernel, may_be_differentiated, register, save, saved
from .scalar import register_scalar_path


def softplus_sums(
    rows: Side, cols: Side | None, inv_tau: float | Tensor, bias: Tensor, *, positives: bool, backend: str
) -> Tensor:
    """Return each row's sum of log(1 + exp(x)) over columns of other groups (M,), where x = inv_tau u_i . v_j + bias.

    Without `cols` the rows are compared among themselves. With `positives`, which needs columns, the sum includes
    log(1 + exp(-x)) over columns of the same group. Differentiable in the rows, the columns, inv_tau and bias.
    """
    of_cols = rows if cols is None else cols
    return _softplus(rows.u, of_cols.u, rows.ids, of_cols.ids, inv_tau, bias, cols is None, positives, backend)


def sigmoid_scalar(
    z_i: Tensor,
    z_j: Tensor,
    inv_tau: float | Tensor,
    bias: Tensor,
    normalize: bool,
    two_views: bool,
    mean: bool,
    backend: str,
) -> Tensor:
    """Return SigLIP over the pairs (z_i, z_j), or NT-Logistic if `two_views`, as a sum or a mean.

    Differentiable in both sides, inv_tau and bias. Backends can skip the gradient of a tower that does not need one.
    """
    needs_i, needs_j = may_be_differentiated(z_i), may_be_differentiated(z_j)
    options = normalize, two_views, mean
    if needs_i or needs_j or may_be_differentiated(inv_tau, bias):
        return _sigmoid_scalar(z_i, z_j, inv_tau, bias, *options, needs_i, needs_j, backend)
    return _sigmoid_value(z_i, z_j, inv_tau, bias, *options, backend)


_sigmoid_scalar, _sigmoid_value = register_scalar_path(
    "sigmoid", "bool normalize, bool two_views, bool mean", with_needs=True, with_bias=True
)


def run_softplus(
    rows: Side,
    cols: Side | None,
    inv_tau: float | Tensor,
    bias: Tensor,
    positives: bool,
    weights: SumWeights | None,
    backend: str,
) -> PairSums:
    """Check the tensors and return the sums and, if there are weights, the gradients."""
    v, v_ids, _ = rows if cols is None else cols
    if weights is None:
        u, v, u_ids, v_ids, k, b = checked("softplus", rows.u, v, rows.ids, v_ids, inv_tau, bias)
    else:
        d_rows, d_cols, u, v, u_ids, v_ids, k, b = checked(
            "softplus_backward", weights.of_rows, weights.of_cols, rows.u, v, rows.ids, v_ids, inv_tau, bias
        )
        weights = weights._replace(of_rows=d_rows, of_cols=d_cols)
    sides = Side(u, u_ids), None if cols is None else Side(v, v_ids)
    found: PairSums = call_kernel(backend, "softplus", u, *sides, k, b, positives, weights)
    return found


def _forward(
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: float | Tensor,
    bias: Tensor,
    same: bool,
    positives: bool,
    backend: str,
) -> Tensor:
    cols = None if same else Side(v, v_ids)
    return run_softplus(Side(u, u_ids), cols, inv_tau, bias, positives, None, backend).rows


def _fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.same, ctx.positives, ctx.backend = inputs
    save(ctx, *tensors)


def _autograd(ctx: Any, d_sums: Tensor) -> tuple[Tensor | None, ...]:
    needs_u, needs_v = ctx.needs_input_grad[:2]
    options = ctx.same, ctx.positives, needs_u, needs_v and not ctx.same, ctx.backend
    tensors = saved(ctx)
    d_cols = d_sums if ctx.same else d_sums.new_zeros(tensors[1].shape[0])
    d_u, d_v, d_inv_tau, d_bias = _softplus_backward(d_sums, d_cols, *tensors, *options)
    return (
        d_u if needs_u else None,
        d_v if needs_v and not ctx.same else None,
        None,
        None,
        d_inv_tau,
        d_bias if ctx.needs_input_grad[5] else None,
        None,
        None,
        None,
    )


def _backward(
    d_rows: Tensor,
    d_cols: Tensor,
    u: Tensor,
    v: Tensor,
    u_ids: Tensor,
    v_ids: Tensor,
    inv_tau: float | Tensor,
    bias: Tensor,
    same: bool,
    positives: bool,
    needs_u: bool,
    needs_v: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = run_softplus(
        Side(u, u_ids),
        None if same else Side(v, v_ids),
        inv_tau,
        bias,
        positives,
        SumWeights(d_rows, d_cols, needs_u, needs_v),
        backend,
    )
    assert found.d_inv_tau is not None
    assert found.d_bias is not None
    return (
        u.new_empty(0) if found.d_rows is None else found.d_rows.to(u.dtype),
        v.new_empty(0) if found.d_cols is None else found.d_cols.to(v.dtype),
        found.d_inv_tau,
        found.d_bias,
    )


def _backward_fake(
    d_rows: Tensor, d_cols: Tensor, u: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_u, needs_v, _ = rest[-3:]
    return (
        u.new_empty(u.shape if needs_u else 0),
        v.new_empty(v.shape if needs_v else 0),
        d_rows.new_empty(()),
        d_rows.new_empty(()),
    )


_TENSORS = "Tensor u, Tensor v, Tensor u_ids, Tensor v_ids, Tensor inv_tau, Tensor bias, bool same, bool positives"
_softplus_backward = register(
    f"softplus_backward(Tensor d_rows, Tensor d_cols, {_TENSORS}, bool needs_u, bool needs_v, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_softplus = register(f"softplus({_TENSORS}, str backend) -> Tensor", _forward, _fake, _setup, _autograd)
