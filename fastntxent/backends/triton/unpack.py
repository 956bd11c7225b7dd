"""Gradients of the inputs, from `gathered` and `radial` (backward.py), the positives and the normalisation.

With gathered_i = sum_j G_ij u_j, radial_i = sum_j G_ij s_ij, n_i = |z_i|, and v_i the weight of row i's positive p(i):

    d/du_i = k (gathered_i + (v_i + v_p(i)) u_p(i))        u_i . d/du_i = k (radial_i + (v_i + v_p(i)) sim_pos_i)
    d/dz_i = (d/du_i - u_i (u_i . d/du_i)) / n_i           where n_i > eps, else (d/du_i) / eps
    d/dk   = share sum_i radial_i + sum_i v_i sim_pos_i    share is 1/2 with one side, 1 with two

If the rows are not normalised, d/dz_i = d/du_i. A program owns SPAN rows, and reads z of these rows and of their
positives. The earlier kernels have written partial sums of d/dk and of the loss. The first program of this kernel adds
them, which saves a launch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..ranges import G_SCALE
from .pack import SPAN, load_stacked
from .sides import Sides, largest_scale, load_inverse_temperature
from .tiles import SIZES, sum_of_parts
from .weights import TileWeights


@triton.jit(do_not_specialize=SIZES)
def _unpack_kernel(
    gathered_ptr, radial_ptr, radial_parts_ptr, largest_ptr, totals_ptr, dots_ptr, bounds_ptr,
    first_ptr, second_ptr, norm_ptr, pos_ptr, d_pos_ptr, d_first_ptr, d_second_ptr, d_inv_tau_ptr, loss_ptr,
    n_gathered, n_radial, n_dots, n_first, n, D, DP,
    stride_gathered, stride_radial, stride_first_m, stride_first_d, stride_second_m, stride_second_d,
    inv_tau, eps, factor, pos_factor, share, loss_factor,
    NORMALIZE: tl.constexpr, WEIGHED: tl.constexpr, PAIRED: tl.constexpr, LOSS: tl.constexpr,
    BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write d/dz of SPAN rows. The first program also writes d/dk and, with LOSS, the loss."""
    k = load_inverse_temperature(inv_tau, ON_DEVICE)
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    inside = row < n
    partner = tl.where(row < n_first, row + n_first, row - n_first)
    scale = factor * tl.load(largest_ptr) * largest_scale(bounds_ptr, BOUNDED) if WEIGHED else factor
    norm = tl.load(norm_ptr + row, mask=inside, other=1.0)
    length = tl.maximum(norm, eps)
    radial = tl.zeros((SPAN,), tl.float32)
    of_part = radial_ptr + row
    for _ in range(0, n_gathered):
        radial += tl.load(of_part, mask=inside, other=0.0)
        of_part += stride_radial
    radial *= scale
    if PAIRED:
        both = tl.load(d_pos_ptr + row, mask=inside, other=0.0) * pos_factor
        both += tl.load(d_pos_ptr + partner, mask=inside, other=0.0) * pos_factor
        radial += both * tl.load(pos_ptr + row, mask=inside, other=0.0)
        partner_length = tl.maximum(tl.load(norm_ptr + partner, mask=inside, other=1.0), eps)
    if tl.program_id(0) == 0:
        d_inv_tau = sum_of_parts(radial_parts_ptr, n_radial) * scale * share
        if PAIRED:
            d_inv_tau += sum_of_parts(dots_ptr, n_dots) * pos_factor
        tl.store(d_inv_tau_ptr, d_inv_tau)
        if LOSS:
            tl.store(loss_ptr, sum_of_parts(totals_ptr, n_dots) * loss_factor)
    wide = row.to(tl.int64)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = inside[:, None] & (d < D)[None, :]
        d_u = tl.zeros((SPAN, BLOCK_D), tl.float32)
        part = gathered_ptr + wide[:, None] * DP + d[None, :]
        for _ in range(0, n_gathered):
            d_u += tl.load(part, mask=here, other=0.0)
            part += stride_gathered
        d_u *= scale
        if PAIRED:
            u = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D,
                stride_first_m, stride_first_d, stride_second_m, stride_second_d,
            )  # fmt: skip
            if NORMALIZE:
                u = u / partner_length[:, None]
            d_u += both[:, None] * u
        if NORMALIZE:
            u = load_stacked(
                first_ptr, second_ptr, row, d, n_first, n, D,
                stride_first_m, stride_first_d, stride_second_m, stride_second_d,
            )  # fmt: skip
            d_u -= u / length[:, None] * tl.where(norm > eps, radial, 0.0)[:, None]
            d_u = d_u / length[:, None]
        of_first = (row < n_first)[:, None]
        tl.store(d_first_ptr + wide[:, None] * D + d[None, :], d_u * k, mask=here & of_first)
        tl.store(d_second_ptr + (wide - n_first)[:, None] * D + d[None, :], d_u * k, mask=here & ~of_first)


class Gathered(NamedTuple):
    """gathered (P, rows, features) and radial (P, rows) in P parts, and partial sums of radial's total."""

    sums: Tensor
    radial: Tensor
    radial_parts: Tensor


class Gradients(NamedTuple):
    """d/dz of both matrices of a side, d/dk, and the loss, which is written only if its partial sums were given."""

    d_first: Tensor
    d_second: Tensor
    d_inv_tau: Tensor
    loss: Tensor


def unpack_gradients(
    sides: Sides,
    weights: TileWeights | None,
    gathered: Gathered,
    *,
    d_pos: Tensor | None = None,
    weight: float = 1.0,
    pos_factor: float = 1.0,
    totals: Tensor | None = None,
) -> Gradients:
    """Return the gradients of the rows' matrices and of k, and the loss if `totals` are given.

    `weight` multiplies G and the loss, and `pos_factor` multiplies `d_pos`. If there are `weights`, they were scaled
    before G was computed from them, and this function undoes the scaling.
    """
    rows, output, unread = sides.rows, sides.work.output, sides.rows.unread
    found = Gradients(output(*rows.first.shape), output(*rows.second.shape), output(), output())
    sides.work.launch(
        _unpack_kernel, (triton.cdiv(rows.n, SPAN),), **rows.matrices(),
        gathered_ptr=gathered.sums, radial_ptr=gathered.radial, radial_parts_ptr=gathered.radial_parts,
        largest_ptr=unread if weights is None else weights.largest, totals_ptr=unread if totals is None else totals,
        dots_ptr=unread if weights is None else weights.dots,
        norm_ptr=rows.norm, pos_ptr=rows.sim_pos, d_pos_ptr=unread if d_pos is None else d_pos.contiguous(),
        d_first_ptr=found.d_first, d_second_ptr=found.d_second, d_inv_tau_ptr=found.d_inv_tau, loss_ptr=found.loss,
        n_gathered=gathered.sums.shape[0], n_radial=gathered.radial_parts.shape[0],
        n_dots=0 if weights is None else weights.dots.shape[0],
        stride_gathered=gathered.sums.stride(0), stride_radial=gathered.radial.stride(0),
        **sides.temperature_and_bounds(), eps=rows.eps,
        factor=weight if weights is None else weight / G_SCALE[rows.x.dtype], pos_factor=pos_factor,
        share=0.5 if sides.one_side else 1.0, loss_factor=weight,
        NORMALIZE=rows.normalize, WEIGHED=weights is not None, PAIRED=d_pos is not None, LOSS=totals is not None,
        SPAN=SPAN, BLOCK_D=min(rows.DP, 64), num_warps=4,
    )  # fmt: skip
    return found
