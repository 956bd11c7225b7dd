"""What losses over rows of past batches need of a compiler: buffers that fill up, and change before the backward.

A slice of a buffer that fills up has a new shape at every batch, and compiled code would be made anew for each.
`held_neg_lse` takes the whole buffer and slices it inside, so one graph serves every fill.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.base import accumulation_dtype
from .contract import checked
from .neg_lse import cross_neg_lse
from .register import register, run_kernel


def held_neg_lse(
    u: Tensor, rows: Tensor, u_ids: Tensor, row_ids: Tensor, held: Tensor, inv_tau: Tensor, backend: str
) -> Tensor:
    """nu of u (M,) against the first `held` of the rows, -inf for none; differentiable in u and inv_tau.

    held: a 0-d integer tensor in host memory.
    """
    if backend == "reference":
        n = int(held)
        return cross_neg_lse(u, rows[:n], u_ids, row_ids[:n], inv_tau, backend)[0]
    return _held_neg_lse(u, rows, u_ids, row_ids, held, inv_tau, backend)


def copy_now(x: Tensor) -> Tensor:
    """A copy of a buffer, for a backward that comes after the buffer has changed.

    A compiler may drop a plain clone() and copy again in the backward, from what the buffer holds by then
    (pytorch/pytorch#197039); it never calls an operator of ours twice.
    """
    return _copy(x) if torch.compiler.is_compiling() else x.clone()


@torch.library.custom_op("fastntxent::copy_now", mutates_args=(), schema="(Tensor x) -> Tensor")
def _copy(x: Tensor) -> Tensor:
    return x.clone()


@_copy.register_fake
def _copy_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _forward(
    u: Tensor, rows: Tensor, u_ids: Tensor, row_ids: Tensor, held: Tensor, inv_tau: Tensor, backend: str
) -> Tensor:
    u, rows, u_ids, row_ids, held, inv_tau = checked("held_neg_lse", u, rows, u_ids, row_ids, held, inv_tau)
    n = _number(held, rows)
    if not n:
        return _fake(u).fill_(-torch.inf)
    return run_kernel(backend, "cross_neg_lse", u, rows[:n], u_ids, row_ids[:n], inv_tau)[0]


def _number(held: Tensor, rows: Tensor) -> int:
    n = int(held)
    if not 0 <= n <= len(rows):
        raise ValueError(f"held must be a number from 0 to {len(rows)}, the rows there are, got {n}")
    return n


def _fake(u: Tensor, *_: Any) -> Tensor:
    return u.new_empty(u.shape[0], dtype=accumulation_dtype(u.dtype))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output)


def _autograd(ctx: Any, d_neg_lse: Tensor) -> tuple[Tensor | None, ...]:
    d_u, d_inv_tau = _held_neg_lse_backward(d_neg_lse, *ctx.saved_tensors, ctx.backend)
    return d_u, None, None, None, None, d_inv_tau, None


def _backward(
    d_neg_lse: Tensor,
    u: Tensor,
    rows: Tensor,
    u_ids: Tensor,
    row_ids: Tensor,
    held: Tensor,
    inv_tau: Tensor,
    neg_lse: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tensors = checked("held_neg_lse_backward", d_neg_lse, u, rows, u_ids, row_ids, held, inv_tau, neg_lse)
    d_neg_lse, u, rows, u_ids, row_ids, held, inv_tau, neg_lse = tensors
    n = _number(held, rows)
    if not n:
        return torch.zeros_like(u), d_neg_lse.new_zeros(())
    d_cols, cols = neg_lse.new_zeros(n), neg_lse.new_full((n,), -torch.inf)  # no gradient reaches the rows
    sides = u, rows[:n], u_ids, row_ids[:n], inv_tau
    d_u, _, d_inv_tau = run_kernel(
        backend, "cross_neg_lse_backward", d_neg_lse, d_cols, *sides, neg_lse, cols, True, False
    )
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
