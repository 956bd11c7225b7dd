"""Rows in: norms, positives and group ids, and the operands of the matrix units.

    n_i = |z_i|,  u_i = z_i / max(n_i, eps) = r_i x_i,  sim_pos_i = u_i . u_p(i)

x_i is z_i times the power of two that brings its largest element to [1, 2): nothing is rounded, whatever the row's
length. Half-precision rows that are not normalised stay as they are, and r_i = 1. Float32 is two parts (tiles.py). The
positives are taken from z itself, in float32.

Reads z and its positive twice, writes x: a program owns SPAN rows, the smallest and largest of their ids, the longest
row and the largest r.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import INTERPRETED, SIZES, in_two_parts, largest_of

SPAN = 32
PADDED_ROWS = 256  # every tile's height and width divide it


@triton.jit
def load_stacked(first_ptr, second_ptr, row, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d):
    """z of stacked rows, in float32, 0 beyond rows and features."""
    of_first = (row < n_first) & (row < n)
    of_second = (row >= n_first) & (row < n)
    inside = (d < D)[None, :]
    row, d = row.to(tl.int64), d.to(tl.int64)
    first = first_ptr + row[:, None] * s_first_m + d[None, :] * s_first_d
    second = second_ptr + (row - n_first)[:, None] * s_second_m + d[None, :] * s_second_d
    z = tl.load(first, mask=of_first[:, None] & inside, other=0.0).to(tl.float32)
    return z + tl.load(second, mask=of_second[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _power_of_two(largest):
    """1 / 2^e for largest in [2^e, 2^(e + 1)), kept normal, and 2^e."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=SIZES)
def _pack_kernel(
    first_ptr, second_ptr, ids_ptr, x_ptr, lo_ptr, r_ptr, norm_ptr, pos_ptr, out_ids_ptr, low_ptr, high_ptr,
    peaks_ptr, s_peaks, n_first, n, D, DP, eps, s_first_m, s_first_d, s_second_m, s_second_d, s_ids,
    NORMALIZE: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, GIVEN_IDS: tl.constexpr, PAIRED: tl.constexpr,
    UPCAST: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    partner = tl.where(row < n_first, row + n_first, row - n_first)

    # Lengths from elements near 1, so that no square leaves the range of float32.
    largest = tl.zeros((SPAN,), tl.float32)
    of_partner = tl.zeros((SPAN,), tl.float32)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z = load_stacked(first_ptr, second_ptr, row, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d)
        largest = tl.maximum(largest, tl.max(tl.abs(z), 1))
        if PAIRED:
            z = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d
            )
            of_partner = tl.maximum(of_partner, tl.max(tl.abs(z), 1))
    down, up = _power_of_two(largest)
    partner_down, partner_up = _power_of_two(of_partner)

    square = tl.zeros((SPAN,), tl.float32)
    partner_square = tl.zeros((SPAN,), tl.float32)
    product = tl.zeros((SPAN,), tl.float32)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z = load_stacked(first_ptr, second_ptr, row, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d)
        x = z * down[:, None] if SCALED else z
        z *= down[:, None]
        square += tl.sum(z * z, 1)
        offs = row.to(tl.int64)[:, None] * DP + d[None, :]
        high, low = in_two_parts(x, x_ptr.dtype.element_ty, SPLIT, UPCAST)
        tl.store(x_ptr + offs, high)
        if SPLIT:
            tl.store(lo_ptr + offs, low)
        if PAIRED:
            p = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d
            )
            p *= partner_down[:, None]
            partner_square += tl.sum(p * p, 1)
            product += tl.sum(z * p, 1)

    root = tl.sqrt_rn(square)
    norm = root * up
    tl.store(norm_ptr + row, norm)
    # 1 / max(n, eps) in units of the scaled row.
    as_they_are = up if SCALED else tl.full((SPAN,), 1.0, tl.float32)
    r = tl.where(norm > eps, tl.div_rn(1.0, root), up / eps) if NORMALIZE else as_they_are
    r = tl.where(row < n, r, 0.0)
    tl.store(r_ptr + row, r)
    program = tl.program_id(0)
    tl.store(peaks_ptr + program, tl.max(tl.where(row < n, norm, 0.0)))
    tl.store(peaks_ptr + s_peaks + program, tl.max(r))
    if PAIRED:
        if NORMALIZE:
            partner_root = tl.sqrt_rn(partner_square)
            partner_r = tl.where(partner_root * partner_up > eps, tl.div_rn(1.0, partner_root), partner_up / eps)
            product = product * r * partner_r
        else:
            product = product * up * partner_up
        tl.store(pos_ptr + row, product)

    if GIVEN_IDS:
        ids = tl.load(ids_ptr + row.to(tl.int64) * s_ids, mask=row < n, other=0).to(tl.int64)
    else:
        ids = tl.where(row < n_first, row, row - n_first).to(tl.int64)
    tl.store(out_ids_ptr + row, ids)
    tl.store(low_ptr + program, tl.min(tl.where(row < n, ids, 0x7FFFFFFFFFFFFFFF)))
    tl.store(high_ptr + program, tl.max(tl.where(row < n, ids, -0x7FFFFFFFFFFFFFFF)))


@triton.jit(do_not_specialize=SIZES)
def _bounds_kernel(rows_peaks, n_rows_peaks, cols_peaks, n_cols_peaks, bounds_ptr):
    """For either side: max|u_i| max|v_j|, and the largest r of the other side."""
    longest = largest_of(rows_peaks, n_rows_peaks) * largest_of(cols_peaks, n_cols_peaks)
    tl.store(bounds_ptr, longest)
    tl.store(bounds_ptr + 1, largest_of(cols_peaks + n_cols_peaks, n_cols_peaks))
    tl.store(bounds_ptr + 4, longest)
    tl.store(bounds_ptr + 5, largest_of(rows_peaks + n_rows_peaks, n_rows_peaks))


class Packed:
    """Stacked rows of one or two matrices as the kernels take them, and the matrices themselves."""

    def __init__(
        self,
        first: Tensor,
        second: Tensor | None = None,
        ids: Tensor | None = None,
        *,
        normalize: bool,
        eps: float,
        tf32: bool,
    ):
        self.first = first
        self.second = first[:0] if second is None else second
        self.normalize, self.eps = normalize, eps
        self.n_first, self.D = first.shape
        self.n = self.n_first + self.second.shape[0]
        self.DP = padded_features(self.D)
        self.tf32 = first.dtype == torch.float32 and tf32
        self.split = first.dtype == torch.float32 and not tf32
        padded = triton.cdiv(self.n, PADDED_ROWS) * PADDED_ROWS
        spans = padded // SPAN
        self.x = first.new_empty((padded, self.DP), dtype=torch.float16 if self.split else first.dtype)
        self.lo = torch.empty_like(self.x) if self.split else self.x
        self.r, self.norm, self.sim_pos = first.new_empty((3, padded), dtype=torch.float32).unbind()
        self.peaks = first.new_empty((2, spans), dtype=torch.float32)
        self.ids = first.new_empty(padded, dtype=torch.int64)
        self.low, self.high = first.new_empty((2, spans), dtype=torch.int64).unbind()
        _pack_kernel[(spans,)](
            first, self.second, self.ids if ids is None else ids,
            self.x, self.lo, self.r, self.norm, self.sim_pos, self.ids, self.low, self.high, self.peaks, spans,
            self.n_first, self.n, self.D, self.DP, eps, *first.stride(), *self.second.stride(),
            0 if ids is None else ids.stride(0),
            NORMALIZE=normalize, SCALED=normalize or first.dtype == torch.float32, SPLIT=self.split,
            GIVEN_IDS=ids is not None, PAIRED=second is not None,
            UPCAST=INTERPRETED, SPAN=SPAN, BLOCK_D=min(self.DP, 64), num_warps=4,
        )  # fmt: skip

    def bounds(self, other: Packed) -> list[Tensor]:
        """For these rows, then for the other: the largest product of lengths, and the largest r of the opposite."""
        bounds = self.new(2, 4)  # rows of 16 bytes: aligned, for one compiled kernel
        _bounds_kernel[(1,)](self.peaks, self.peaks.shape[1], other.peaks, other.peaks.shape[1], bounds, num_warps=4)
        return list(bounds.unbind())

    def new(self, *shape: int) -> Tensor:
        """A float32 tensor where the rows are, not yet written."""
        return self.r.new_empty(shape)


def padded_features(D: int) -> int:
    """Features of a packed row: a power of two up to 256, then a multiple of 128."""
    return max(16, triton.next_power_of_2(D)) if D <= 256 else triton.cdiv(D, 128) * 128
