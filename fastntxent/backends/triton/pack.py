"""Rows in and gradients out: norms, positives and group ids, and the operands of the matrix units.

    n_i = |z_i|,  u_i = z_i / max(n_i, eps) = r_i x_i,  sim_pos_i = u_i . u_p(i)

x_i is z_i times the power of two that brings its largest element to [1, 2): nothing is rounded, whatever the row's
length. Half-precision rows that are not normalised stay as they are, and r_i = 1. Float32 is two parts (tiles.py).

Reads z three times, writes x: a program owns SPAN rows, and the smallest and largest of their ids. On the way back,
with gathered_i = sum_j G_ij u_j, radial_i = sum_j G_ij s_ij and the positives' weights p (backward.py):

    d/du_i = k (gathered_i + (p_i + p_p(i)) u_p(i))        u_i . d/du_i = k (radial_i + (p_i + p_p(i)) sim_pos_i)
    d/dz_i = (d/du_i - u_i (u_i . d/du_i)) / n_i           where n_i > eps, else (d/du_i) / eps

The positives are taken from z itself, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import INTERPRETED, in_two_parts, inverse_temperature

SPAN = 32
PADDED_ROWS = 128  # every tile's height divides it


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


@triton.jit
def _pack_kernel(
    first_ptr, second_ptr, ids_ptr, x_ptr, lo_ptr, r_ptr, norm_ptr, pos_ptr, out_ids_ptr, low_ptr, high_ptr,
    n_first, n, D, DP, eps, s_first_m, s_first_d, s_second_m, s_second_d, s_ids,
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

    root = tl.sqrt(square)
    norm = root * up
    tl.store(norm_ptr + row, norm)
    # 1 / max(n, eps) in units of the scaled row.
    as_they_are = up if SCALED else tl.full((SPAN,), 1.0, tl.float32)
    r = tl.where(norm > eps, 1.0 / root, up / eps) if NORMALIZE else as_they_are
    tl.store(r_ptr + row, tl.where(row < n, r, 0.0))
    if PAIRED:
        if NORMALIZE:
            partner_root = tl.sqrt(partner_square)
            partner_r = tl.where(partner_root * partner_up > eps, 1.0 / partner_root, partner_up / eps)
            product = product * r * partner_r
        else:
            product = product * up * partner_up
        tl.store(pos_ptr + row, product)

    if GIVEN_IDS:
        ids = tl.load(ids_ptr + row.to(tl.int64) * s_ids, mask=row < n, other=0).to(tl.int64)
    else:
        ids = tl.where(row < n_first, row, row - n_first).to(tl.int64)
    tl.store(out_ids_ptr + row, ids)
    program = tl.program_id(0)
    tl.store(low_ptr + program, tl.min(tl.where(row < n, ids, 0x7FFFFFFFFFFFFFFF)))
    tl.store(high_ptr + program, tl.max(tl.where(row < n, ids, -0x7FFFFFFFFFFFFFFF)))


@triton.jit
def _unpack_kernel(
    gathered_ptr, radial_ptr, largest_ptr, first_ptr, second_ptr, norm_ptr, pos_ptr, d_pos_ptr,
    d_first_ptr, d_second_ptr, share_ptr, n_first, n, D, DP, eps, factor, pos_factor, share, inv_tau,
    s_first_m, s_first_d, s_second_m, s_second_d,
    NORMALIZE: tl.constexpr, PAIRED: tl.constexpr, ON_DEVICE: tl.constexpr, SPAN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    row = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    inside = row < n
    partner = tl.where(row < n_first, row + n_first, row - n_first)
    scale = factor * tl.load(largest_ptr)
    norm = tl.load(norm_ptr + row, mask=inside, other=1.0)
    length = tl.maximum(norm, eps)
    radial = tl.load(radial_ptr + row, mask=inside, other=0.0) * scale
    d_inv_tau = radial * share
    if PAIRED:
        own = tl.load(d_pos_ptr + row, mask=inside, other=0.0) * pos_factor
        both = own + tl.load(d_pos_ptr + partner, mask=inside, other=0.0) * pos_factor
        sim = tl.load(pos_ptr + row, mask=inside, other=0.0)
        partner_length = tl.maximum(tl.load(norm_ptr + partner, mask=inside, other=1.0), eps)
        radial += both * sim
        d_inv_tau += own * sim
    tl.store(share_ptr + tl.program_id(0), tl.sum(d_inv_tau))
    wide = row.to(tl.int64)
    for start in range(0, DP, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        here = inside[:, None] & (d < D)[None, :]
        d_u = tl.load(gathered_ptr + wide[:, None] * DP + d[None, :], mask=here, other=0.0) * scale
        if PAIRED:
            u = load_stacked(
                first_ptr, second_ptr, partner, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d
            )
            if NORMALIZE:
                u = u / partner_length[:, None]
            d_u += both[:, None] * u
        if NORMALIZE:
            u = load_stacked(first_ptr, second_ptr, row, d, n_first, n, D, s_first_m, s_first_d, s_second_m, s_second_d)
            d_u -= u / length[:, None] * tl.where(norm > eps, radial, 0.0)[:, None]
            d_u = d_u / length[:, None]
        of_first = (row < n_first)[:, None]
        tl.store(d_first_ptr + wide[:, None] * D + d[None, :], d_u * k, mask=here & of_first)
        tl.store(d_second_ptr + (wide - n_first)[:, None] * D + d[None, :], d_u * k, mask=here & ~of_first)


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
        self.paired = second is not None
        self.DP = padded_features(self.D)
        self.tf32 = first.dtype == torch.float32 and tf32
        self.split = first.dtype == torch.float32 and not tf32
        padded = triton.cdiv(self.n, PADDED_ROWS) * PADDED_ROWS
        self.x = first.new_empty((padded, self.DP), dtype=torch.float16 if self.split else first.dtype)
        self.lo = torch.empty_like(self.x) if self.split else self.x
        self.r, self.norm, self.sim_pos = first.new_empty((3, padded), dtype=torch.float32)
        self.ids = first.new_empty(padded, dtype=torch.int64)
        self.low, self.high = first.new_empty((2, padded // SPAN), dtype=torch.int64)
        _pack_kernel[(padded // SPAN,)](
            first, self.second, self.ids if ids is None else ids,
            self.x, self.lo, self.r, self.norm, self.sim_pos, self.ids, self.low, self.high,
            self.n_first, self.n, self.D, self.DP, eps, *first.stride(), *self.second.stride(),
            0 if ids is None else ids.stride(0),
            NORMALIZE=normalize, SCALED=normalize or first.dtype == torch.float32, SPLIT=self.split,
            GIVEN_IDS=ids is not None, PAIRED=self.paired,
            UPCAST=INTERPRETED, SPAN=SPAN, BLOCK_D=min(self.DP, 64), num_warps=4,
        )  # fmt: skip

    def largest_scale(self) -> Tensor:
        """A bound of r, a 0-d tensor."""
        return self.r.new_ones(()) if self.normalize else self.r.amax()

    def longest(self) -> Tensor:
        """max |u|, a 0-d tensor."""
        return self.norm[: self.n].amax()

    def unpack(
        self,
        gathered: Tensor,
        radial: Tensor,
        largest: Tensor,
        factor: float,
        share: float,
        d_pos: Tensor | None,
        pos_factor: float,
        inv_tau: Tensor | float,
        on_device: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d/dz of both matrices, and the part of d/dk: what was gathered counts factor * largest, d_pos pos_factor,
        radial in d/dk the share of a side."""
        d_first, d_second = (z.new_empty(z.shape, dtype=torch.float32) for z in (self.first, self.second))
        programs = triton.cdiv(self.n, SPAN)
        shares = radial.new_empty(programs)
        _unpack_kernel[(programs,)](
            gathered, radial, largest, self.first, self.second, self.norm, self.sim_pos,
            radial if d_pos is None else d_pos.contiguous(),
            d_first, d_second, shares, self.n_first, self.n, self.D, self.DP, self.eps, factor, pos_factor, share,
            inv_tau, *self.first.stride(), *self.second.stride(),
            NORMALIZE=self.normalize, PAIRED=d_pos is not None, ON_DEVICE=on_device,
            SPAN=SPAN, BLOCK_D=min(self.DP, 64), num_warps=4,
        )  # fmt: skip
        return d_first, d_second, shares.sum()


def padded_features(D: int) -> int:
    """Features of a packed row: a power of two up to 256, then a multiple of 128."""
    return max(16, triton.next_power_of_2(D)) if D <= 256 else triton.cdiv(D, 128) * 128
