"""The weights of nu: their largest magnitude, and four numbers per row from which tiles of G are computed.

The numbers are float32. R is an upper bound of the columns' r (`largest_scale`).

    a      w exp(-nu) in the direct regime, w in the shifted regime; scaled so that the largest |w| becomes G_SCALE
    r/R    exact, because R is a power of two
    a r/R  for the tiles in which the row is a column
    nu     inf if the row has no negative

The scaling makes the kernels independent of the magnitude of the weights (2^16 from a loss scaler, 1e-6 from a mean).
Quantities of a single row are computed here once, not in every tile.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..base import Upstream
from ..ranges import G_SCALE
from .sides import Sides, in_direct_range, largest_scale, load_inverse_temperature
from .tiles import LOG2_E, SIZES, TINY, max_of_parts, survey_weights

SURVEYED = 1024  # rows per program of `_survey_kernel`
SCALED = 128  # rows per program of `_scale_kernel`
NUMBERS = 4  # numbers per row, listed above


@triton.jit(do_not_specialize=SIZES)
def _survey_kernel(
    w_ptr, nu_ptr, d_pos_ptr, pos_ptr, peaks_ptr, dots_ptr, n, PAIRED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write each program's largest weight and its sum of d_pos times sim_pos.

    This kernel is for weights that come from an upstream gradient. With a loss, `end_rows` writes these results.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + offs, mask=offs < n, other=0.0)
    nu = tl.load(nu_ptr + offs, mask=offs < n, other=0.0)
    dots = w
    if PAIRED:
        dots = tl.load(d_pos_ptr + offs, mask=offs < n, other=0.0) * tl.load(pos_ptr + offs, mask=offs < n, other=0.0)
    survey_weights(w, nu, dots, peaks_ptr, dots_ptr, offs, n)


@triton.jit(do_not_specialize=SIZES)
def _scale_kernel(
    w_ptr, nu_ptr, r_ptr, peaks_ptr, largest_ptr, scaled_ptr, bounds_ptr, n, n_peaks, stride_scaled, inv_tau, log_terms,
    BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, G_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the four numbers of every row, and the largest weight.

    In a row without negatives, the upstream gradient is ignored and all probabilities are 0.
    """
    direct = in_direct_range(bounds_ptr, load_inverse_temperature(inv_tau, ON_DEVICE), log_terms, BOUNDED)
    largest = max_of_parts(peaks_ptr, n_peaks)
    if tl.program_id(0) == 0:
        tl.store(largest_ptr, largest)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + offs, mask=offs < n, other=0.0)
    nu = tl.load(nu_ptr + offs, mask=offs < n, other=-float("inf"))
    empty = nu == -float("inf")
    nu = tl.where(empty, float("inf"), nu)
    a = tl.where(empty, 0.0, w / tl.where(largest < TINY, TINY, largest) * G_SCALE)
    a *= tl.exp2(tl.where(direct, -nu * LOG2_E, 0.0))
    r = tl.div_rn(tl.load(r_ptr + offs), largest_scale(bounds_ptr, BOUNDED))
    tl.store(scaled_ptr + offs, a)
    tl.store(scaled_ptr + stride_scaled + offs, r)
    tl.store(scaled_ptr + 2 * stride_scaled + offs, a * r)
    tl.store(scaled_ptr + 3 * stride_scaled + offs, nu)


class Weights(NamedTuple):
    """Each side's nu with its weights; `of_cols` is None if there is one side.

    peaks: each program's largest weight. dots: each program's sum of the positives' weights times sim_pos.
    """

    of_rows: Upstream
    of_cols: Upstream | None
    peaks: Tensor
    dots: Tensor


class TileWeights(NamedTuple):
    """The four numbers of every row and every column, the largest weight, and `dots` from `Weights`."""

    rows_w: Tensor
    cols_w: Tensor
    largest: Tensor
    dots: Tensor

    def swapped(self) -> TileWeights:
        """Return the same weights with rows and columns exchanged."""
        return self._replace(rows_w=self.cols_w, cols_w=self.rows_w)


def survey(sides: Sides, of_rows: Upstream, of_cols: Upstream | None = None, d_pos: Tensor | None = None) -> Weights:
    """Return weights from the upstream gradients of every side's nu and, in `d_pos`, of the positives."""
    of_rows, of_cols = _contiguous(of_rows), None if of_cols is None else _contiguous(of_cols)
    upstreams = [of_rows] if of_cols is None else [of_rows, of_cols]
    # The numbers of programs are multiples of 4, so the parts of `found` are aligned and use the same compiled kernel.
    programs = [triton.cdiv(side.rows.n, 4 * SURVEYED) * 4 for side in sides.each()]
    found = sides.work.empty(2, sum(programs))
    for side, upstream, parts in zip(sides.each(), upstreams, found.split(programs, dim=1), strict=True):
        peaks, dots = parts.unbind()
        sides.work.launch(
            _survey_kernel, (parts.shape[1],), w_ptr=upstream.d_neg_lse, nu_ptr=upstream.neg_lse,
            d_pos_ptr=side.rows.unread if d_pos is None else d_pos, pos_ptr=side.rows.sim_pos,
            peaks_ptr=peaks, dots_ptr=dots, n=side.rows.n, PAIRED=d_pos is not None, BLOCK=SURVEYED, num_warps=4,
        )  # fmt: skip
    peaks, dots = found.unbind()
    return Weights(of_rows, of_cols, peaks, dots)


def _contiguous(upstream: Upstream) -> Upstream:
    return Upstream(upstream.d_neg_lse.contiguous(), upstream.neg_lse.contiguous())


def scale(sides: Sides, weights: Weights) -> TileWeights:
    """Return the weights in the form that tiles of G take."""
    largest = sides.work.empty()
    rows_w = _scale_columns(sides.swapped(), weights.of_rows, weights.peaks, largest)
    of_cols = weights.of_cols
    cols_w = rows_w if of_cols is None else _scale_columns(sides, of_cols, weights.peaks, largest)
    return TileWeights(rows_w, cols_w, largest, weights.dots)


def _scale_columns(sides: Sides, upstream: Upstream, peaks: Tensor, largest: Tensor) -> Tensor:
    """Return the four numbers of every column, and write the largest weight."""
    cols = sides.cols
    scaled = sides.work.empty(NUMBERS, *cols.r.shape)
    sides.work.launch(
        _scale_kernel, (cols.r.shape[0] // SCALED,), w_ptr=upstream.d_neg_lse, nu_ptr=upstream.neg_lse, r_ptr=cols.r,
        peaks_ptr=peaks, largest_ptr=largest, scaled_ptr=scaled, n=cols.n, n_peaks=peaks.shape[0],
        stride_scaled=scaled.stride(0), **sides.regime(),
        G_SCALE=G_SCALE[cols.x.dtype], BLOCK=SCALED, num_warps=4,
    )  # fmt: skip
    return scaled
