"""Packing of the input rows: norms, positives, group ids, and the operands of the matrix units.

    n_i = |z_i|,  u_i = z_i / max(n_i, eps) = r_i x_i,  sim_pos_i = u_i . u_p(i)

x_i is z_i times the power of two that brings its largest element into [1, 2). In half precision this scaling is exact,
whatever the norm of the row, except that a float16 x below 2^-14 is rounded to a multiple of 2^-24. Half-precision rows
that are not normalised stay as they are, with r_i = 1. float32 rows are stored in two parts, unless TF32 is allowed
(tiles.py). The similarities to the positives are computed from z itself, in float32.

A program owns SPAN rows. It reads them and their positives twice. For each row it writes x, r, the norm, the id and, if
there is a positive, the similarity to it. For the whole span it writes the smallest and the largest id, the largest
norm and the largest r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Work
from .tiles import FARTHEST, INTERPRETED, SIZES, in_two_parts, power_of_two

SPAN = 32
PADDED_ROWS = 256  # rows are padded to a multiple of this; every tile's height and width divide it


@triton.jit
def load_stacked(
    first_ptr, second_ptr, row, d, n_first, n, D, stride_first_m, stride_first_d, stride_second_m, stride_second_d
):
    """Return elements of the stacked matrices in float32, with 0 outside the matrices."""
    of_first = (row < n_first) & (row < n)
    of_second = (row >= n_first) & (row < n)
    inside = (d < D)[None, :]
    row, d = row.to(tl.int64), d.to(tl.int64)
    first = first_ptr + row[:, None] * stride_first_m + d[None, :] * stride_first_d
    second = second_ptr + (row - n_first)[:, None] * stride_second_m + d[None, :] * stride_second_d
    z = tl.load(first, mask=of_first[:, None] & inside, other=0.0).to(tl.float32)
    return z + tl.load(second, mask=of_second[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_features(x, SPAN: tl.constexpr):
    """Return each row's sum of up to 64 features, added pairwise.

    A reduction of more than two elements would add them in the order of the layout, which depends on the strides of z.
    """
    for _ in tl.static_range(6):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (SPAN, x.shape[1] // 2, 2)), 2)
    return tl.reshape(x, (SPAN,))


@triton.jit(do_not_specialize=SIZES)
def _pack_kernel(
    first_ptr, second_ptr, ids_ptr, x_ptr, lo_ptr, r_ptr, norm_ptr, pos_ptr, out_ids_ptr, low_ptr, high_ptr, peaks_ptr,
    n_first, n, D, DP, stride_first_m, stride_first_d, stride_second_m, stride_second_d, stride_ids, stride_peaks, eps,
    NORMALIZE: tl.constexpr, SCALED: tl.constexpr, SPLIT: tl.constexpr, GIVEN_IDS: tl.constexpr, PAIRED: tl.constexpr,
    UPCAST: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    partner = tl.where(row < n_first, row + n_first, row - n_first)

    # For the norms, elements are scaled so that the row's largest is near 1. Then the sum of their squares neither
    # overflows nor underflows. The maximum drops a NaN, but x still contains it.
    largest = tl.zeros((SPAN,), tl.float32)
    of_partner = tl.zeros((SPAN,), tl.float32)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z = load_stacked(
            first_ptr, second_ptr, row, d, n_first, n, D,
            stride_first_m, stride_first_d, stride_second_m, stride_second_d,
        )  # fmt: skip
        largest = tl.maximum(largest, tl.max(tl.abs(z), 1))
        if PAIRED:
            z = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D,
                stride_first_m, stride_first_d, stride_second_m, stride_second_d,
            )  # fmt: skip
            of_partner = tl.maximum(of_partner, tl.max(tl.abs(z), 1))
    down, up = power_of_two(largest)
    partner_down, partner_up = power_of_two(of_partner)

    square = tl.zeros((SPAN,), tl.float32)
    partner_square = tl.zeros((SPAN,), tl.float32)
    product = tl.zeros((SPAN,), tl.float32)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z = load_stacked(
            first_ptr, second_ptr, row, d, n_first, n, D,
            stride_first_m, stride_first_d, stride_second_m, stride_second_d,
        )  # fmt: skip
        x = z * down[:, None] if SCALED else z
        z *= down[:, None]
        square += _sum_features(z * z, SPAN)
        offs = row.to(tl.int64)[:, None] * DP + d[None, :]
        high, low = in_two_parts(x, x_ptr.dtype.element_ty, SPLIT, UPCAST)
        tl.store(x_ptr + offs, high)
        if SPLIT:
            tl.store(lo_ptr + offs, low)
        if PAIRED:
            p = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D,
                stride_first_m, stride_first_d, stride_second_m, stride_second_d,
            )  # fmt: skip
            p *= partner_down[:, None]
            partner_square += _sum_features(p * p, SPAN)
            product += _sum_features(z * p, SPAN)

    root = tl.sqrt_rn(square)
    norm = root * up
    tl.store(norm_ptr + row, norm)
    # With `up` = 2^e, r is 2^e / max(n, eps).
    as_they_are = up if SCALED else tl.full((SPAN,), 1.0, tl.float32)
    r = tl.where(norm > eps, tl.div_rn(1.0, root), up / eps) if NORMALIZE else as_they_are
    r = tl.where(row < n, r, 0.0)
    tl.store(r_ptr + row, r)
    program = tl.program_id(0)
    tl.store(peaks_ptr + program, tl.max(tl.where(row < n, norm, 0.0)))
    tl.store(peaks_ptr + stride_peaks + program, tl.max(r))
    if PAIRED:
        if NORMALIZE:
            partner_root = tl.sqrt_rn(partner_square)
            partner_r = tl.where(partner_root * partner_up > eps, tl.div_rn(1.0, partner_root), partner_up / eps)
            product = product * r * partner_r
        else:
            product = product * up * partner_up
        tl.store(pos_ptr + row, product)

    if GIVEN_IDS:
        ids = tl.load(ids_ptr + row.to(tl.int64) * stride_ids, mask=row < n, other=0).to(tl.int64)
    else:
        ids = tl.where(row < n_first, row, row - n_first).to(tl.int64)
    tl.store(out_ids_ptr + row, ids)
    tl.store(low_ptr + program, tl.min(tl.where(row < n, ids, FARTHEST)))
    tl.store(high_ptr + program, tl.max(tl.where(row < n, ids, -FARTHEST)))


@dataclass(frozen=True, eq=False)
class Packed:
    """The stacked rows of one or two matrices in the form that kernels take, with the matrices themselves.

    `x` is the operand and `lo` its low part (x again if there is none). `r` is the factor from x to the rows u,
    `norm` the rows' norms, and `sim_pos` the similarities to the positives. For every SPAN rows, `low` and `high` are
    the smallest and largest id, and `peaks` are the largest norm and the largest r.
    """

    first: Tensor
    second: Tensor
    n_first: int
    n: int
    D: int
    DP: int
    normalize: bool
    eps: float
    tf32: bool
    split: bool
    x: Tensor
    lo: Tensor
    r: Tensor
    norm: Tensor
    sim_pos: Tensor
    ids: Tensor
    low: Tensor
    high: Tensor
    peaks: Tensor

    @property
    def unread(self) -> Tensor:
        """A float32 tensor to pass for a pointer that the kernel does not read."""
        return self.r

    def operands(self, side: str) -> dict[str, Any]:
        """Return a kernel's arguments `rows_x_ptr` to `n_rows`, or `cols_x_ptr` to `n_cols`."""
        return {
            f"{side}_x_ptr": self.x, f"{side}_lo_ptr": self.lo, f"{side}_r_ptr": self.r,
            f"{side}_ids_ptr": self.ids, f"{side}_low_ptr": self.low, f"{side}_high_ptr": self.high,
            f"n_{side}": self.n,
        }  # fmt: skip

    def matrices(self) -> dict[str, Any]:
        """Return a kernel's arguments for the packed matrices."""
        first_m, first_d = self.first.stride()
        second_m, second_d = self.second.stride()
        return {
            "first_ptr": self.first, "second_ptr": self.second,
            "n_first": self.n_first, "n": self.n, "D": self.D, "DP": self.DP,
            "stride_first_m": first_m, "stride_first_d": first_d,
            "stride_second_m": second_m, "stride_second_d": second_d,
        }  # fmt: skip


def pack_rows(
    work: Work,
    first: Tensor,
    second: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    normalize: bool,
    eps: float,
    tf32: bool,
) -> Packed:
    """Return the packed rows of one matrix, or of two views that hold each other's positives.

    Without `ids` the id of a row is its index within its matrix.
    """
    n_first, D = first.shape
    n, DP = n_first + (0 if second is None else second.shape[0]), padded_features(D)
    padded = triton.cdiv(n, PADDED_ROWS) * PADDED_ROWS
    spans = padded // SPAN
    full = first.dtype == torch.float32
    split = full and not tf32
    x = work.empty(padded, DP, dtype=torch.float16 if split else first.dtype)
    lo = work.empty(padded, DP, dtype=x.dtype) if split else x
    r, norm, sim_pos = work.empty(3, padded).unbind()
    peaks = work.empty(2, spans)
    own_ids = work.empty(padded, dtype=torch.int64)
    low, high = work.empty(2, spans, dtype=torch.int64).unbind()
    packed = Packed(
        first, first[:0] if second is None else second, n_first, n, D, DP, normalize, eps, full and tf32, split,
        x, lo, r, norm, sim_pos, own_ids, low, high, peaks,
    )  # fmt: skip
    work.launch(
        _pack_kernel, (spans,), **packed.matrices(),
        ids_ptr=own_ids if ids is None else ids, stride_ids=0 if ids is None else ids.stride(0),  # read if GIVEN_IDS
        x_ptr=x, lo_ptr=lo, r_ptr=r, norm_ptr=norm, pos_ptr=sim_pos, out_ids_ptr=own_ids, low_ptr=low, high_ptr=high,
        peaks_ptr=peaks, stride_peaks=spans, eps=eps,
        NORMALIZE=normalize, SCALED=normalize or full, SPLIT=split, GIVEN_IDS=ids is not None,
        PAIRED=second is not None, UPCAST=INTERPRETED, SPAN=SPAN, BLOCK_D=min(DP, 64), num_warps=4,
    )  # fmt: skip
    return packed


def padded_features(D: int) -> int:
    """Return the number of features of a packed row: a power of two from 16 to 256, beyond that a multiple of 128."""
    return max(16, triton.next_power_of_2(D)) if D <= 256 else triton.cdiv(D, 128) * 128
