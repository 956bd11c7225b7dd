"""NT-Xent as operators: the scalar path, the weighted path, and the loss alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import accumulation_dtype, row_losses
from ..backends.reference import BACKEND as _REFERENCE
from .contract import checked
from .register import autocast_off, register, run_kernel, transforming


def nt_xent_rows(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    """nu and pi of every row, (2N,) each, differentiable in both views and inv_tau."""
    if backend == "reference":
        with autocast_off(z_i):
            return _REFERENCE.nt_xent_rows(z_i, z_j, inv_tau, normalize)
    return _nt_xent_rows(z_i, z_j, inv_tau, normalize, backend)


def nt_xent_scalar(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool, backend: str) -> Tensor:
    """The sum or the mean of the 2N losses, differentiable in both views and inv_tau."""
    if backend == "reference":
        losses = row_losses(*nt_xent_rows(z_i, z_j, inv_tau, normalize, backend))
        return losses.mean() if mean else losses.sum()
    # Inside a vmap a tensor does not say that a gradient is wanted around it.
    wanted = z_i.requires_grad or z_j.requires_grad or inv_tau.requires_grad or transforming()
    if wanted and torch.is_grad_enabled():
        return _nt_xent_scalar(z_i, z_j, inv_tau, normalize, mean, backend)
    return _nt_xent_value(z_i, z_j, inv_tau, normalize, mean, backend)


# --- the weighted path -----------------------------------------------------------------------------------------------


def _rows_forward(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    return run_kernel(backend, "nt_xent_rows", z_i, z_j, inv_tau, normalize)


def _rows_fake(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, backend: str) -> tuple[Tensor, Tensor]:
    neg_lse = z_i.new_empty(2 * z_i.shape[0], dtype=accumulation_dtype(z_i.dtype))
    return neg_lse, torch.empty_like(neg_lse)


def _rows_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalize, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[0])


def _rows_autograd(ctx: Any, d_neg_lse: Tensor, d_pos: Tensor) -> tuple[Tensor | None, ...]:
    return *_rows_backward(d_neg_lse, d_pos, *ctx.saved_tensors, ctx.normalize, ctx.backend), None, None


def _rows_backward_forward(
    d_neg_lse: Tensor,
    d_pos: Tensor,
    z_i: Tensor,
    z_j: Tensor,
    inv_tau: Tensor,
    neg_lse: Tensor,
    normalize: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (d_neg_lse, d_pos, z_i, z_j, inv_tau, neg_lse)
    d_z_i, d_z_j, d_inv_tau = run_kernel(backend, "nt_xent_rows_backward", *tensors, normalize)
    return d_z_i.to(z_i.dtype), d_z_j.to(z_j.dtype), d_inv_tau


def _rows_backward_fake(
    d_neg_lse: Tensor, d_pos: Tensor, z_i: Tensor, z_j: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return z_i.new_empty(z_i.shape), z_j.new_empty(z_j.shape), d_neg_lse.new_empty(())


_rows_backward = register(
    "nt_xent_rows_backward(Tensor d_neg_lse, Tensor d_pos, Tensor z_i, Tensor z_j, Tensor inv_tau, Tensor neg_lse,"
    " bool normalize, str backend) -> (Tensor, Tensor, Tensor)",
    _rows_backward_forward,
    _rows_backward_fake,
)
_nt_xent_rows = register(
    "nt_xent_rows(Tensor z_i, Tensor z_j, Tensor inv_tau, bool normalize, str backend) -> (Tensor, Tensor)",
    _rows_forward,
    _rows_fake,
    _rows_setup,
    _rows_autograd,
)

# --- the scalar path -------------------------------------------------------------------------------------------------


def _scalar_forward(
    z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run_kernel(backend, "nt_xent_scalar", z_i, z_j, inv_tau, normalize, mean)


def _scalar_fake(
    z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z_i.dtype)
    return tuple(z_i.new_empty(shape, dtype=dtype) for shape in ((), z_i.shape, z_j.shape, ()))  # type: ignore


def _scalar_setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    z_i, z_j, inv_tau, *_ = inputs
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # no zeros for gradients that nobody asks for
    # The backward needs no z; it takes them so that a second derivative finds its way to the refusal.
    ctx.save_for_backward(*gradients, z_i, z_j, inv_tau)


def _scalar_autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:  # nothing came back
        return (None,) * 6
    # An operator of its own only where this may be differentiated again: elsewhere it is three products.
    scale = _scalar_backward if torch.is_grad_enabled() else _scaled
    return *scale(d_loss, *ctx.saved_tensors), None, None, None


def _scalar_backward_forward(
    d_loss: Tensor, d_z_i: Tensor, d_z_j: Tensor, d_inv_tau: Tensor, z_i: Tensor, z_j: Tensor, inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _scaled(*checked("nt_xent_scalar_backward", d_loss, d_z_i, d_z_j, d_inv_tau, z_i, z_j, inv_tau))


def _scaled(
    d_loss: Tensor, d_z_i: Tensor, d_z_j: Tensor, d_inv_tau: Tensor, z_i: Tensor, z_j: Tensor, inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _as(d_loss * d_z_i, z_i.dtype), _as(d_loss * d_z_j, z_j.dtype), d_loss * d_inv_tau


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # a call that does nothing takes as long as a product


def _scalar_backward_fake(
    d_loss: Tensor, d_z_i: Tensor, d_z_j: Tensor, d_inv_tau: Tensor, z_i: Tensor, z_j: Tensor, inv_tau: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return z_i.new_empty(z_i.shape), z_j.new_empty(z_j.shape), torch.empty_like(d_inv_tau)


_scalar_backward = register(
    "nt_xent_scalar_backward(Tensor d_loss, Tensor d_z_i, Tensor d_z_j, Tensor d_inv_tau, Tensor z_i, Tensor z_j,"
    " Tensor inv_tau) -> (Tensor, Tensor, Tensor)",
    _scalar_backward_forward,
    _scalar_backward_fake,
)
_nt_xent_scalar = register(
    "nt_xent_scalar(Tensor z_i, Tensor z_j, Tensor inv_tau, bool normalize, bool mean, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _scalar_forward,
    _scalar_fake,
    _scalar_setup,
    _scalar_autograd,
    value_alone=True,
)

# --- the loss alone --------------------------------------------------------------------------------------------------


def _value_forward(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool, backend: str) -> Tensor:
    return run_kernel(backend, "nt_xent_value", z_i, z_j, inv_tau, normalize, mean)


def _value_fake(z_i: Tensor, z_j: Tensor, inv_tau: Tensor, normalize: bool, mean: bool, backend: str) -> Tensor:
    return z_i.new_empty((), dtype=accumulation_dtype(z_i.dtype))


def _value_autograd(ctx: Any, d_loss: Tensor) -> None:
    raise RuntimeError("fastntxent::nt_xent_value has no gradient: fastntxent::nt_xent_scalar gives both")


_nt_xent_value = register(
    "nt_xent_value(Tensor z_i, Tensor z_j, Tensor inv_tau, bool normalize, bool mean, str backend) -> Tensor",
    _value_forward,
    _value_fake,
    backward=_value_autograd,
)
