"""NT-Xent as operators: the scalar path, the weighted path (nu and pi of every row), and the loss alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from .register import may_be_differentiated, register, run_kernel, save, saved
from .scalar import register_scalar_path


def nt_xent_rows(
    z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Return nu and pi of every row, (2N,) each, differentiable in both views and inv_tau."""
    return _nt_xent_rows(z_i, z_j, inv_tau, normalize, backend)


def nt_xent_scalar(
    z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, mean: bool, backend: str
) -> Tensor:
    """Return the sum or mean of the 2N losses, differentiable in both views and inv_tau."""
    if may_be_differentiated(z_i, z_j, inv_tau):
        return _nt_xent_scalar(z_i, z_j, inv_tau, normalize, mean, backend)
    return _nt_xent_value(z_i, z_j, inv_tau, normalize, mean, backend)


# --- the weighted path -----------------------------------------------------------------------------------------------


def _rows_forward(
    z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return run_kernel(backend, "nt_xent_rows", z_i, z_j, inv_tau, normalize)


def _rows_fake(
    z_i: Tensor, z_j: Tensor, inv_tau: float | Tensor, normalize: bool, backend: str
) -> tuple[Tensor, Tensor]:
    neg_lse = z_i.new_empty(2 * z_i.shape[0], dtype=accumulation_dtype(z_i.dtype))
    return neg_lse, torch.empty_like(neg_lse)


def _rows_setup(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.normalize, ctx.backend = inputs
    save(ctx, *tensors, output[0])


def _rows_autograd(ctx: Any, d_neg_lse: Tensor, d_pos: Tensor) -> tuple[Tensor | None, ...]:
    return *_rows_backward(d_neg_lse, d_pos, *saved(ctx), ctx.normalize, ctx.backend), None, None


def _rows_backward_forward(
    d_neg_lse: Tensor,
    d_pos: Tensor,
    z_i: Tensor,
    z_j: Tensor,
    inv_tau: float | Tensor,
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

# --- the scalar path, and the loss alone ------------------------------------------------------------------------------

_nt_xent_scalar, _nt_xent_value = register_scalar_path("nt_xent", "bool normalize, bool mean")
