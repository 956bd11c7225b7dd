"""Pairs that no ids describe: lists of them, and dense masks, a piece at a time.

    checked_pairs  (indices_tuple)      -> anchors and positives, anchors and negatives
    pairs_of_ids   (ids, ref_ids)       -> rows and columns of the same id
    pair_dots      (u, v, a, b)         -> u_a . v_b of each pair (P,)
    lse_by_anchor  (logits, anchors)    -> log-sum-exp of each anchor's pairs
    mask_product   (mask, x)            -> mask @ x, for a mask of any dtype

A list of P pairs costs 2 P D flops forward and 4 P D backward, its gathered rows are held a chunk at a time, and beside
the rows it takes memory for P numbers. A mask of B x B costs 2 B^2 D flops each way; one of another dtype than the
rows' is converted a block at a time. Sums have a fixed order on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.base import row_dots
from ..ops import autocast_off
from ..validation import ID_DTYPES

_CHUNK = 2**20  # numbers held at once

IndicesTuple = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


def checked_pairs(indices_tuple: IndicesTuple, n_rows: int, n_cols: int, device: torch.device) -> tuple[Tensor, ...]:
    """Anchors and positives, anchors and negatives, from pairs or triplets of indices of rows and columns."""
    if not isinstance(indices_tuple, (tuple, list, Tensor)):
        raise TypeError(f"indices_tuple must be a tuple of 3 or 4 tensors, got {type(indices_tuple).__name__}")
    if len(indices_tuple) not in (3, 4):
        raise ValueError(f"indices_tuple must have 3 or 4 tensors, got {len(indices_tuple)}")
    for index in indices_tuple:
        if not isinstance(index, Tensor) or index.dtype not in ID_DTYPES or index.ndim != 1:
            raise TypeError("indices_tuple must hold tensors of one dimension and an integer dtype")
    indices = [index.to(device, torch.int64) for index in indices_tuple]
    a1, p, a2, n = indices if len(indices) == 4 else (*indices[:2], indices[0], indices[2])
    if len(a1) != len(p) or len(a2) != len(n):
        raise ValueError(f"indices_tuple must hold pairs, got lengths {[len(index) for index in indices_tuple]}")
    for index, limit in ((a1, n_rows), (p, n_cols), (a2, n_rows), (n, n_cols)):
        if len(index) and not (index.min() >= 0 and index.max() < limit):
            raise ValueError(f"indices_tuple must have indices in [0, {limit}), got {index.tolist()[:8]}")
    return a1, p, a2, n


def pairs_of_ids(ids: Tensor, ref_ids: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Rows and columns with the same id, row after row; `own`: column i is row i itself, and left out.

    O(P) memory for P pairs, and a wait for the device.
    """
    in_order, columns = torch.sort(ref_ids, stable=True)
    first = torch.searchsorted(in_order, ids.contiguous())
    counts = torch.searchsorted(in_order, ids.contiguous(), right=True) - first
    a = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
    begin = first - (counts.cumsum(0) - counts)  # of a row's run among the columns, less where its pairs begin
    p = columns[begin[a] + torch.arange(len(a), device=ids.device)]
    if own:
        kept = a != p
        a, p = a[kept], p[kept]
    return a, p


def pair_dots(u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """u_a . v_b for every pair of indices (a, b): (P,), differentiable in u and v."""
    return _PairDots.apply(u, v, a, b)


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(u, v, a, b)
        dots = u.new_empty(len(a))
        for some in _chunks(len(a), u.shape[1]):
            dots[some] = row_dots(u[a[some]], v[b[some]])
        return dots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_dots: Tensor) -> tuple[Tensor | None, ...]:
        u, v, a, b = ctx.saved_tensors
        d_u, d_v = torch.zeros_like(u), torch.zeros_like(v)
        for some in _chunks(len(a), u.shape[1]):
            d = d_dots[some, None]
            _add_rows(d_u, a[some], d * v[b[some]])
            _add_rows(d_v, b[some], d * u[a[some]])
        return d_u, d_v, None, None


def lse_by_anchor(logits: Tensor, anchors: Tensor, n_anchors: int) -> Tensor:
    """Log-sum-exp of the logits of each anchor (n_anchors,); -inf, without a gradient, for one that has none."""
    largest = logits.new_full((n_anchors,), -torch.inf)
    largest = largest.scatter_reduce(0, anchors, logits.detach(), "amax")
    empty = largest == -torch.inf
    sums = sum_by_anchor(torch.exp(logits - largest[anchors]), anchors, n_anchors)
    return torch.where(empty, -torch.inf, largest + sums.masked_fill(empty, 1).log())


def sum_by_anchor(values: Tensor, anchors: Tensor, n_anchors: int) -> Tensor:
    """The sum of each anchor's values (n_anchors,)."""
    zeros = values.new_zeros(n_anchors)
    if values.device.type == "cpu":
        return zeros.index_add(0, anchors, values)
    return zeros.index_put((anchors,), values, accumulate=True)


def mask_product(mask: Tensor, x: Tensor) -> Tensor:
    """mask @ x for a mask (B, C) of any dtype, differentiable in x, and in a mask of x's dtype."""
    with autocast_off(x):
        return mask @ x if mask.dtype == x.dtype else _MaskProduct.apply(mask, x)


class _MaskProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mask: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.dtype = x.dtype
        return torch.cat([mask[rows].to(x.dtype) @ x for rows in _chunks(*mask.shape)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        d_x = d_out.new_zeros(mask.shape[1], d_out.shape[1])
        with autocast_off(d_out):
            for rows in _chunks(*mask.shape):
                d_x.addmm_(mask[rows].to(ctx.dtype).T, d_out[rows])
        return None, d_x


def _chunks(length: int, width: int) -> list[slice]:
    height = max(1, _CHUNK // width)
    return [slice(start, start + height) for start in range(0, length, height)]


def _add_rows(into: Tensor, index: Tensor, rows: Tensor) -> None:
    if into.device.type == "cpu":
        into.index_add_(0, index, rows)
    else:
        into.index_put_((index,), rows, accumulate=True)
