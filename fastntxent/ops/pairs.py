"""Pairs that ids cannot describe, given as a list or as a dense mask and processed in pieces.

    pair_dots      (u, v, a, b)    -> u_a . v_b for each pair (P,)
    mask_product   (mask, x)       -> mask @ x without the mask's diagonal, for a bool mask or one of any real dtype

These are operators so that a compiled, exported or traced graph does not depend on the number of pairs. A list of P
pairs costs 2 P D flops forward and 4 P D backward, and the rows of its pairs are gathered one piece at a time. A B x C
mask without a gradient costs 2 B C D flops forward and 2 B C D backward, and is converted to the dtype of x one piece
at a time. Sums have a fixed order on every device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..algebra import autocast_off, product, row_dots
from .contract import checked
from .register import may_be_differentiated, register

_CHUNK = 2**20  # elements in a piece


def pair_dots(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return u_a . v_b for every pair of indices (a, b): (P,), differentiable in u and v."""
    return _pair_dots(u, v, a, b)


def mask_product(mask: Tensor, x: Tensor) -> Tensor:
    """Return mask @ x for a mask (B, C), bool or of any real dtype, whose diagonal counts as zero.

    Subtracting the diagonal afterwards would lose small entries of a row to rounding. Differentiable in x and in the
    mask. A mask that may need a gradient is copied, which takes O(B C) memory.
    """
    if not (mask.is_floating_point() and may_be_differentiated(mask)):
        return _mask_product(mask, x)
    mask = mask.to(x.dtype)
    return product(mask.diagonal_scatter(torch.zeros_like(mask.diagonal())), x)


def _height(width: int) -> int:
    """Return the number of rows of this width in a piece."""
    return max(1, _CHUNK // max(1, width))


# --- lists -----------------------------------------------------------------------------------------------------------


def _dots_forward(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    u, v, a, b = checked("pair_dots", u, v, a, b)
    height = _height(u.shape[1])
    return torch.cat(
        [
            row_dots(u.index_select(0, i), v.index_select(0, j))
            for i, j in zip(a.split(height), b.split(height), strict=True)
        ]
    )


def _dots_fake(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return u.new_empty(a.shape[0])


def _dots_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dots_autograd(ctx: Any, d_dots: Tensor) -> tuple[Tensor | None, ...]:
    return *_pair_dots_backward(d_dots, *ctx.saved_tensors), None, None


def _dots_backward(d_dots: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    d_dots, u, v, a, b = checked("pair_dots_backward", d_dots, u, v, a, b)
    d_u, d_v = torch.zeros_like(u), torch.zeros_like(v)
    height = _height(u.shape[1])
    for d, i, j in zip(d_dots.unsqueeze(1).split(height), a.split(height), b.split(height), strict=True):
        _add_rows(d_u, i, d * v.index_select(0, j))
        _add_rows(d_v, j, d * u.index_select(0, i))
    return d_u, d_v


def _add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    if into.device.type == "cpu":
        into.index_add_(0, index, rows)
    else:
        into.index_put_((index,), rows, accumulate=True)


def _dots_backward_fake(d_dots: Tensor, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(v)


_pair_dots_backward = register(
    "pair_dots_backward(Tensor d_dots, Tensor u, Tensor v, Tensor a, Tensor b) -> (Tensor, Tensor)",
    _dots_backward,
    _dots_backward_fake,
)
_pair_dots = register(
    "pair_dots(Tensor u, Tensor v, Tensor a, Tensor b) -> Tensor",
    _dots_forward,
    _dots_fake,
    _dots_setup,
    _dots_autograd,
)

# --- masks -----------------------------------------------------------------------------------------------------------


def _pieces(mask: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield copies of the mask's pieces in this dtype, with zeros on the mask's diagonal."""
    first = 0
    for rows in mask.split(_height(mask.shape[1])):
        piece = rows.to(dtype, copy=True)
        piece.diagonal(first).zero_()
        yield piece
        first += rows.shape[0]


def _mask_forward(mask: Tensor, x: Tensor) -> Tensor:
    mask, x = checked("mask_product", mask, x)
    with autocast_off(x):
        return torch.cat([piece @ x for piece in _pieces(mask, x.dtype)])


def _mask_fake(mask: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(mask.shape[0], x.shape[1])


def _mask_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mask_autograd(ctx: Any, d_out: Tensor) -> tuple[None, Tensor]:
    return None, _mask_product_backward(d_out, *ctx.saved_tensors)


def _mask_backward(d_out: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    d_out, mask, x = checked("mask_product_backward", d_out, mask, x)
    d_x = torch.zeros_like(x)
    with autocast_off(x):
        for piece, d_piece in zip(_pieces(mask, x.dtype), d_out.split(_height(mask.shape[1])), strict=True):
            d_x.addmm_(piece.T, d_piece)
    return d_x


def _mask_backward_fake(d_out: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


# The backward needs only the shape and dtype of x. It takes x itself so that autograd connects its result to x, and a
# second derivative raises an error.
_mask_product_backward = register(
    "mask_product_backward(Tensor d_out, Tensor mask, Tensor x) -> Tensor", _mask_backward, _mask_backward_fake
)
_mask_product = register(
    "mask_product(Tensor mask, Tensor x) -> Tensor", _mask_forward, _mask_fake, _mask_setup, _mask_autograd
)
