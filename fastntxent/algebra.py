"""Plain tensor algebra for the losses: unit rows, products of rows, row losses, and log-sum-exps of two terms.

Everything is differentiable tensor code. It computes in the accumulation dtype: float64 for float64 embeddings, else
float32. Only `product` takes more than O(M D) time.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # the default of torch.nn.functional.normalize
_AS_IT_IS = contextlib.nullcontext()


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every narrower dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_eps(dtype: torch.dtype) -> float:
    """Return the smallest norm that a row is divided by: 1e-12, or in float16 the smallest normal number, because 1e-12
    would round to zero."""
    return torch.finfo(torch.float16).tiny if dtype == torch.float16 else NORM_EPS


def unit_rows(z: Tensor, normalize: bool = True) -> Tensor:
    """Return rows (the last dimension) in the accumulation dtype, divided by max(|z|, eps) if `normalize` is set."""
    u = z.to(accumulation_dtype(z.dtype))
    if not normalize:
        return u
    if (factor := overflow_factor(u, z.dtype)) is not None:
        u = u * factor
    return F.normalize(u, dim=-1, eps=norm_eps(z.dtype))


def overflow_factor(u: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return a power of two for each row (..., 1), below 1 where the row's squares might overflow float32.

    Scaling a row by its factor changes no bit of the unit row, except in elements below 2^-106. Return None for
    float16, whose squares do not overflow float32, and for float64, whose rows are not scaled.
    """
    if dtype in (torch.float16, torch.float64):
        return None
    largest = torch.linalg.vector_norm(u.detach(), ord=torch.inf, dim=-1, keepdim=True)
    return torch.ones_like(largest).masked_fill(largest > 2.0**60, 2.0**-80)


def autocast_off(rows: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which autocast is off for the device of the rows."""
    if not torch._C._is_any_autocast_enabled():
        return _AS_IT_IS
    device_type = rows.device.type
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _AS_IT_IS


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b, for two matrices or two batches of matrices, unaffected by autocast in the forward and in the
    backward.

    The backward of PyTorch's own product is a product too. If `backward` is called under autocast, that product runs in
    half precision, regardless of the precision of the forward.
    """
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace cannot record an autograd.Function
        with autocast_off(a):
            return a @ b
    found: Tensor = (_Product if torch.compiler.is_compiling() else _TransformedProduct).apply(a, b)
    return found


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b without broadcasting: it raises if a saved-tensor hook returned a tensor of a different shape."""
    return torch.bmm(a, b) if a.ndim == 3 else torch.mm(a, b)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with autocast_off(a):
            return _multiplied(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        with autocast_off(a):
            return (
                _multiplied(d_product, b.mT) if needs_a else None,
                _multiplied(a.mT, d_product) if needs_b else None,
            )


class _TransformedProduct(_Product):
    """A `_Product` that supports second derivatives, forward mode and vmap. torch.compile does not trace it."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, d_product: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        return product(d_product, b.mT) if needs_a else None, product(a.mT, d_product) if needs_b else None

    @staticmethod
    def jvp(ctx: Any, d_a: Tensor | None, d_b: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        of_b = None if d_b is None else product(a, d_b)
        if d_a is None:
            return of_b
        return product(d_a, b) if of_b is None else product(d_a, b) + of_b


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return a_i . b_i for every row: (M, D), (M, D) -> (M,)."""
    return (a * b).sum(dim=1)


def swap_views(rows: Tensor) -> Tensor:
    """Return rows that are stacked as [z_i; z_j] with the two views exchanged: [z_j; z_i]."""
    first, second = rows.chunk(2)
    return torch.cat((second, first))


def row_losses(neg_lse: Tensor, pos: Tensor) -> Tensor:
    """Return softplus(nu - pi) with full relative accuracy. PyTorch's softplus would return nu - pi itself above 20."""
    return 0 - F.logsigmoid(pos - neg_lse)  # a minus sign alone would turn a loss of 0 into -0


def loss_weight(z_i: Tensor, mean: bool) -> float:
    """Return the weight of a row's loss in the mean or the sum over the 2N rows of N samples."""
    return 0.5 / z_i.shape[0] if mean else 1.0


def direction_weight(z_i: Tensor, both: bool, mean: bool) -> float:
    """Return the weight of a row's loss in the mean or the sum over N pairs, halved where both directions count."""
    return (0.5 if both else 1.0) / (z_i.shape[0] if mean else 1)


def weighted_sum(neg_lse: Tensor, weights: Tensor) -> Tensor:
    """Return sum_i w_i nu_i over the rows whose nu is not -inf."""
    return (neg_lse.masked_fill(neg_lse == -torch.inf, 0) * weights).sum()


def scale_gradient(x: Tensor, scale: float | Tensor) -> Tensor:
    """Return x with its gradient multiplied by `scale`. `scale` itself gets no gradient."""
    return torch.where(x.isinf(), x, x + (scale - 1) * (x - x.detach()))  # inf - inf is NaN


def log_add(a: Tensor, b: Tensor) -> Tensor:
    """Return log(exp a + exp b), with a gradient of zero instead of NaN where both are -inf."""
    empty = a == -torch.inf
    return torch.where(empty, b, torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)))


def in_double(x: Tensor) -> Tensor:
    """Return x in float64, or unchanged on a device that may not support float64."""
    return x.double() if x.device.type in ("cpu", "cuda", "meta") else x
