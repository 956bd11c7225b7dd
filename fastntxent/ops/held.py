"""Losses against a buffer of rows from past batches, in a form that torch.compile handles well.

While such a buffer fills up, its filled slice has a new shape in every batch, and torch.compile would recompile each
time. `held_neg_lse` and `held_loss` take the whole buffer and slice it inside the operator, so one graph is enough for
every fill level. The buffer may also change before the backward; `copy_now` protects against that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, autocast_off, row_losses
from ..backends.base import Upstream
from ..sides import Side
from .contract import checked
from .kernels import run_cross_neg_lse, run_cross_neg_lse_backward
from .neg_lse import cross_neg_lse
from .register import (
    kernels_for,
    may_be_differentiated,
    register,
    save,
    save_gradients,
    saved,
    scaled,
)


def held_neg_lse(
    u: Tensor, rows: Tensor, u_ids: Tensor, row_ids: Tensor, held: Tensor | None, inv_tau: float | Tensor, backend: str
) -> Tensor:
    """Return nu (M,) of the rows u against the first `held` rows of the buffer `rows`; -inf if `held` is 0.

    Differentiable in u and inv_tau.

    held: a 0-d integer tensor in host memory, or None for the whole buffer.
    """
    if held is None:
        return cross_neg_lse(u, rows, u_ids, row_ids, inv_tau, backend)[0]
    return _held_neg_lse(u, rows, u_ids, row_ids, held, inv_tau, backend)


def copy_now(x: Tensor) -> Tensor:
    """Return a copy of a buffer that may change before the backward.

    torch.compile may recompute a plain clone() in the backward, when the buffer already holds different values
    (pytorch/pytorch#197039). It never recomputes a call of a custom operator.
    """
    return _copy(x) if torch.compiler.is_compiling() else x.clone()


@torch.library.custom_op("fastntxent::copy_now", mutates_args=(), schema="(Tensor x) -> Tensor")
def _copy(x: Tensor) -> Tensor:
    return x.clone()


@_copy.register_fake
def _copy_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _forward(
    u: Tensor, rows: Tensor, u_ids: Tensor, row_ids: Tensor, held: Tensor, inv_tau: float | Tensor, backend: str
) -> Tensor:
    u, rows, u_ids, row_ids, held, inv_tau = checked("held_neg_lse", u, rows, u_ids, row_ids, held, inv_tau)
    n = _held_rows(held, rows)
    if not n:
        return _fake(u).fill_(-torch.inf)
    return run_cross_neg_lse(Side(u, u_ids), Side(rows[:n], row_ids[:n]), inv_tau, backend)[0]


def _held_rows(held: Tensor, rows: Tensor) -> int:
    n = int(held)
    if not 0 <= n <= len(rows):
        raise ValueError(f"held must be between 0 and {len(rows)}, the number of rows, got {n}")
    return n


def _fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    save(ctx, *tensors, output)


def _autograd(ctx: Any, d_neg_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_inv_tau = _held_neg_lse_backward(d_neg_lse, *saved(ctx), ctx.backend)
    return d_u, None, None, None, None, d_inv_tau, None


def _backward(
    d_neg_lse: Tensor,
    u: Tensor,
    rows: Tensor,
    u_ids: Tensor,
    row_ids: Tensor,
    held: Tensor,
    inv_tau: float | Tensor,
    neg_lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = checked("held_neg_lse_backward", d_neg_lse, u, rows, u_ids, row_ids, held, inv_tau, neg_lse)
    d_neg_lse, u, rows, u_ids, row_ids, held, inv_tau, neg_lse = tensors
    n = _held_rows(held, rows)
    if not n:
        return torch.zeros_like(u), d_neg_lse.new_zeros(())
    # The buffer's rows get no gradient.
    of_u = Upstream(d_neg_lse, neg_lse)
    of_rows = Upstream(neg_lse.new_zeros(n), neg_lse.new_full((n,), -torch.inf), wanted=False)
    d_u, _, d_inv_tau = run_cross_neg_lse_backward(
        Side(u, u_ids), Side(rows[:n], row_ids[:n]), inv_tau, of_u, of_rows, backend
    )
    assert d_u is not None
    return d_u.to(u.dtype), d_inv_tau


def _backward_fake(d_neg_lse: Tensor, u: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), d_neg_lse.new_empty(())


_held_neg_lse_backward = register(
    "held_neg_lse_backward(Tensor d_neg_lse, Tensor u, Tensor rows, Tensor u_ids, Tensor row_ids, Tensor held,"
    " Tensor inv_tau, Tensor neg_lse, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_held_neg_lse = register(
    "held_neg_lse(Tensor u, Tensor rows, Tensor u_ids, Tensor row_ids, Tensor held, Tensor inv_tau, str backend)"
    " -> Tensor",
    _forward,
    _fake,
    _setup,
    _autograd,
)

# --- a loss, with its gradient ---------------------------------------------------------------------------------------


def held_loss(
    u: Tensor,
    rows: Tensor,
    u_ids: Tensor,
    row_ids: Tensor,
    held: Tensor | None,
    inv_tau: float | Tensor,
    against: Tensor,
    mean: bool,
    backend: str,
) -> Tensor:
    """Return the sum or mean of log(1 + exp(nu - against)), with nu as in `held_neg_lse`, and against (M,).

    Differentiable in u, inv_tau and `against`.
    """
    if held is None:
        held = torch.ones((), dtype=torch.int64, device="cpu") * rows.shape[0]
    needs_u = may_be_differentiated(u)
    return _held_loss(u, rows, u_ids, row_ids, held, inv_tau, against, mean, needs_u, backend)


def _loss_forward(
    u: Tensor,
    rows: Tensor,
    u_ids: Tensor,
    row_ids: Tensor,
    held: Tensor,
    inv_tau: float | Tensor,
    against: Tensor,
    mean: bool,
    needs_u: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    u, rows, u_ids, row_ids, held, k, against = checked("held_loss", u, rows, u_ids, row_ids, held, inv_tau, against)
    n = _held_rows(held, rows)
    kernels = kernels_for(backend, u)
    with autocast_off(u):
        if not n:
            zero = against.new_zeros(())
            return zero, _zero_gradient(u), torch.zeros_like(against), zero.clone()
        sides = Side(u, u_ids), Side(rows[:n], row_ids[:n])
        if hasattr(kernels, "loss_against"):
            loss, d_u, d_against, d_k = kernels.loss_against(*sides, k, against, mean, needs_u)
            return loss, _zero_gradient(u) if d_u is None else d_u, d_against, d_k
        nu, _ = kernels.cross_neg_lse(*sides, k)
        weight = 1 / u.shape[0] if mean else 1.0
        w = weight * torch.sigmoid(nu - against)
        of_rows = Upstream(w.new_zeros(n), w.new_full((n,), -torch.inf), wanted=False)
        d_u, _, d_k = kernels.cross_neg_lse_backward(*sides, k, Upstream(w, nu, needs_u), of_rows)
        return weight * row_losses(nu, against).sum(), _zero_gradient(u) if d_u is None else d_u, -w, d_k


def _zero_gradient(u: Tensor) -> Tensor:
    return u.new_zeros((), dtype=accumulation_dtype(u.dtype)).expand(u.shape).contiguous()


def _loss_fake(u: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    against = rest[5]
    return (
        against.new_empty(()),
        u.new_empty(u.shape, dtype=accumulation_dtype(u.dtype)),
        against.new_empty(against.shape),
        against.new_empty(()),
    )


def _loss_setup(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    u, inv_tau, against = inputs[0], inputs[5], inputs[6]
    _, d_u, d_against, d_inv_tau = output
    save_gradients(ctx, (d_u, d_inv_tau, d_against), u, inv_tau, against)


def _loss_autograd(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * 10
    if torch.is_grad_enabled():
        d_u, d_inv_tau, d_against = _held_loss_backward(d_loss, *saved(ctx))
    else:
        d_u, d_inv_tau, d_against, u, _, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad
        d_u = scaled(d_loss, d_u, u) if needed[0] else None
        d_inv_tau = d_loss * d_inv_tau if needed[5] else None
        d_against = d_loss * d_against if needed[6] else None
    return d_u, None, None, None, None, d_inv_tau, d_against, None, None, None


def _scale_loss_gradients(
    d_loss: Tensor,
    d_u: Tensor,
    d_inv_tau: Tensor,
    d_against: Tensor,
    u: Tensor,
    inv_tau: float | Tensor,
    against: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    d_loss, d_u, d_inv_tau, d_against, u, _, _ = checked(
        "held_loss_backward", d_loss, d_u, d_inv_tau, d_against, u, inv_tau, against
    )
    return scaled(d_loss, d_u, u), d_loss * d_inv_tau, d_loss * d_against


def _scale_loss_gradients_fake(
    d_loss: Tensor, d_u: Tensor, d_inv_tau: Tensor, d_against: Tensor, u: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), torch.empty_like(d_inv_tau), torch.empty_like(d_against)


_held_loss_backward = register(
    "held_loss_backward(Tensor d_loss, Tensor d_u, Tensor d_inv_tau, Tensor d_against, Tensor u, Tensor inv_tau,"
    " Tensor against) -> (Tensor, Tensor, Tensor)",
    _scale_loss_gradients,
    _scale_loss_gradients_fake,
)
_held_loss = register(
    "held_loss(Tensor u, Tensor rows, Tensor u_ids, Tensor row_ids, Tensor held, Tensor inv_tau, Tensor against,"
    " bool mean, bool needs_u, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss_forward,
    _loss_fake,
    _loss_setup,
    _loss_autograd,
    value_alone=True,
)
