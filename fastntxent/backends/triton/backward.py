"""The gradient of sum_i w_i nu_i for one side of packed rows, as far as it is O(M^2 D).

    G_ij = w_i P_ij + w_j P_ji      gathered_i = sum_j G_ij u_j      radial_i = sum_j G_ij s_ij

`unpack.py` makes the gradients in z and k of these. One owner per row block, G formed once a tile, nothing added
atomically. radial is summed in float32 before G becomes an operand: what is rounded to half precision is G alone.

Where they fit, a program of `_fused_kernel` holds the sums of all its rows' features: it forms a tile of G, rounds it,
and multiplies it with the columns, reading x of all columns once. Of small batches it takes a part of the columns, so
that no multiprocessor idles; `unpack.py` adds the parts in their order. Where they do not fit (config.py),
`_form_kernel` writes G of a panel of rows, and `_gather_kernel` multiplies it, a block of features at a time. The panel
is as high as the workspace and an even load allow; it costs one write of G and about one read.

Two regimes, as in forward.py: launched both where only the device knows which one it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .forward import Forward, Weights
from .pack import PADDED_ROWS, SPAN, Packed
from .tiles import (
    SIZES,
    add_product,
    in_direct_range,
    in_two_parts,
    inverse_temperature,
    largest_of,
    largest_scale,
    load_rows,
    masked,
    rounded,
    scaled_weights,
    similarities,
    store_rows,
    survey_weights,
    weigh,
)
from .unpack import unpack_kernel

SURVEYED = 1024  # rows of a program of `_survey_kernel`
WORKSPACE = 384 * 2**20  # bytes of a panel of G; more where 256 rows of it are more

# The largest weight in a tile, of operands of that type: float16 has no numbers below 6e-8, nor above 65504.
_G_SCALE = {torch.float16: 4096.0, torch.bfloat16: 1.0, torch.float32: 1.0}


@triton.jit(do_not_specialize=SIZES)
def _fused_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    rows_w, rows_nu, cols_w, cols_nu, peaks_ptr, n_peaks, gathered_ptr, s_gathered, radial_ptr, s_radial,
    radial_parts, part_cols, inv_tau, bounds, log_terms, DP,
    SHIFTED: tl.constexpr, G_SCALE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(k, bounds, log_terms, BOUNDED) == SHIFTED:
        return
    largest, largest_r = largest_of(peaks_ptr, n_peaks), largest_scale(bounds, BOUNDED)
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    r_m = tl.load(rows_r + offs_m)
    w_m, nu_m = scaled_weights(rows_w, rows_nu, offs_m, n_rows, largest, G_SCALE, SHIFTED)
    x_m = load_rows(rows_x, row, 0, DP, BLOCK_M, BLOCK_D)
    lo_m = load_rows(rows_lo, row, 0, DP, BLOCK_M, BLOCK_D) if SPLIT else x_m
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    radial = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.program_id(1)
    first_col = part * part_cols
    for col in range(first_col, tl.minimum(first_col + part_cols, n_cols), BLOCK_N):
        offs_n = col + tl.arange(0, BLOCK_N)
        x_n = load_rows(cols_x, col, 0, DP, BLOCK_N, BLOCK_D)
        lo_n = load_rows(cols_lo, col, 0, DP, BLOCK_N, BLOCK_D) if SPLIT else x_n
        r_n = tl.load(cols_r + offs_n)
        w_n, nu_n = scaled_weights(cols_w, cols_nu, offs_n, n_cols, largest, G_SCALE, SHIFTED)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        s = add_product(s, x_m, lo_m, tl.trans(x_n), tl.trans(lo_n), SPLIT, TF32, UPCAST)
        g = weigh(s, r_m, r_n, k, w_m, nu_m, w_n, nu_n, SHIFTED)
        g = masked(
            g, 0.0, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
            BLOCK_M, BLOCK_N, SPAN,
        )  # fmt: skip
        g *= (r_n / largest_r)[None, :]
        radial += tl.sum(s * g, 1)
        g_high, g_low = in_two_parts(g, x_n.dtype, SPLIT, UPCAST)
        acc = add_product(acc, g_high, g_low, x_n, lo_n, SPLIT, TF32, UPCAST)
    radial *= r_m
    tl.store(radial_ptr + part * s_radial + offs_m, radial)
    tl.store(radial_parts + part * tl.num_programs(0) + tl.program_id(0), tl.sum(radial))
    store_rows(gathered_ptr + part.to(tl.int64) * s_gathered, acc, row, 0, DP, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def _form_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    rows_w, rows_nu, cols_w, cols_nu, largest_ptr, g_ptr, s_g, parts_ptr, s_part, first_row,
    inv_tau, bounds, log_terms, DP,
    SHIFTED: tl.constexpr, G_SCALE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A tile of a panel's G, each column times its r over the largest, and its part of sum_j G_ij s_ij / r_i. The tiles
    of one column run together, and share x of their rows and of their columns in the second-level cache."""
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(k, bounds, log_terms, BOUNDED) == SHIFTED:
        return
    largest, largest_r = tl.load(largest_ptr), largest_scale(bounds, BOUNDED)
    height, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    row = first_row + height
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    s = similarities(rows_x, rows_lo, cols_x, cols_lo, row, col, DP, BLOCK_M, BLOCK_N, BLOCK_D, SPLIT, TF32, UPCAST)
    r_m, r_n = tl.load(rows_r + offs_m), tl.load(cols_r + offs_n)
    w_m, nu_m = scaled_weights(rows_w, rows_nu, offs_m, n_rows, largest, G_SCALE, SHIFTED)
    w_n, nu_n = scaled_weights(cols_w, cols_nu, offs_n, n_cols, largest, G_SCALE, SHIFTED)
    g = weigh(s, r_m, r_n, k, w_m, nu_m, w_n, nu_n, SHIFTED)
    g = masked(
        g, 0.0, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
        BLOCK_M, BLOCK_N, SPAN,
    )  # fmt: skip
    g *= (r_n / largest_r)[None, :]
    offs_h = height + tl.arange(0, BLOCK_M)
    tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * s_part + offs_h, tl.sum(s * g, 1))
    tl.store(g_ptr + offs_h.to(tl.int64)[:, None] * s_g + offs_n[None, :], rounded(g, g_ptr.dtype.element_ty, UPCAST))


@triton.jit(do_not_specialize=SIZES)
def _gather_kernel(
    g_ptr, s_g, parts_ptr, s_part, n_parts, first_row, n_rows, cols_x, cols_lo, n_cols, rows_r, gathered_ptr,
    radial_ptr, radial_parts, DP,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A panel's G times the columns, for a block of rows and features. The blocks of one row run together, and share
    its G in the second-level cache."""
    height, d = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_D
    offs_h = height + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for col in range(0, n_cols, BLOCK_N):
        offs_n = col + tl.arange(0, BLOCK_N)
        g = tl.load(g_ptr + offs_h.to(tl.int64)[:, None] * s_g + offs_n[None, :])
        x_n = load_rows(cols_x, col, d, DP, BLOCK_N, BLOCK_D)
        lo_n = load_rows(cols_lo, col, d, DP, BLOCK_N, BLOCK_D) if SPLIT else x_n
        high, low = in_two_parts(g, x_n.dtype, SPLIT, UPCAST)
        acc = add_product(acc, high, low, x_n, lo_n, SPLIT, TF32, UPCAST)
    store_rows(gathered_ptr, acc, first_row + height, d, DP, BLOCK_M, BLOCK_D)
    if d == 0:
        radial = tl.zeros((BLOCK_M,), tl.float32)
        part = parts_ptr + offs_h
        for _ in range(0, n_parts):
            radial += tl.load(part)
            part += s_part
        radial *= tl.load(rows_r + first_row + offs_h)
        radial = tl.where(first_row + offs_h < n_rows, radial, 0.0)  # `_form_kernel`'s tiles may end before ours
        tl.store(radial_ptr + first_row + offs_h, radial)
        tl.store(radial_parts + (first_row + height) // BLOCK_M, tl.sum(radial))


@triton.jit(do_not_specialize=SIZES)
def _largest_kernel(peaks_ptr, n_peaks, largest_ptr):
    """The largest weight, found once for the many tiles of a panel."""
    tl.store(largest_ptr, largest_of(peaks_ptr, n_peaks))


@triton.jit(do_not_specialize=SIZES)
def _survey_kernel(
    w_ptr, nu_ptr, d_pos_ptr, pos_ptr, n, peaks_ptr, dots_ptr, PAIRED: tl.constexpr, BLOCK: tl.constexpr
):
    """What weights from outside are like."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w_ptr + offs, mask=offs < n, other=0.0)
    nu = tl.load(nu_ptr + offs, mask=offs < n, other=0.0)
    dots = w
    if PAIRED:
        dots = tl.load(d_pos_ptr + offs, mask=offs < n, other=0.0) * tl.load(pos_ptr + offs, mask=offs < n, other=0.0)
    survey_weights(w, nu, dots, offs, n, peaks_ptr, dots_ptr)


def survey(sides: list[Packed], w: list[Tensor], nus: list[Tensor], d_pos: Tensor | None = None) -> Weights:
    """The weights of every side's nu, and of the positives."""
    programs = [triton.cdiv(side.n, 4 * SURVEYED) * 4 for side in sides]  # aligned, for one compiled kernel
    found = sides[0].new(2, sum(programs))
    parts = found.split(programs, dim=1)
    w, nus = [x.contiguous() for x in w], [nu.contiguous() for nu in nus]
    for side, w_side, nu, part in zip(sides, w, nus, parts, strict=True):
        _survey_kernel[(part.shape[1],)](
            w_side, nu, w_side if d_pos is None else d_pos, side.sim_pos, side.n, *part.unbind(),
            PAIRED=d_pos is not None, BLOCK=SURVEYED, num_warps=4,
        )  # fmt: skip
    return Weights(w, *found.unbind())


class Backward:
    """The gradient of one packed side at a time, with the forward's regime."""

    def __init__(self, forward: Forward, weights: Weights, nus: list[Tensor]):
        self.forward, self.weights = forward, weights
        self.nus = [nu.contiguous() for nu in nus]

    def run(
        self,
        which: int,
        *,
        d_pos: Tensor | None = None,
        weight: float = 1.0,
        pos_factor: float = 1.0,
        totals: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """d/dz of both matrices of side `which`, d/dk, and, of `totals`, `weight` times their sum. `weight` is a factor
        of the weights of nu, `pos_factor` of d_pos, those of the positives."""
        rows, cols = self.forward.sides[which], self.forward.sides[-1 - which]
        w, peaks = self.weights.of_sides, self.weights.peaks
        operands = (
            *self.forward.operands(rows), *self.forward.operands(cols),
            w[which], self.nus[which], w[-1 - which], self.nus[-1 - which],
        )  # fmt: skip
        gather = self._panels if config.choose("fused", rows) is None else self._fused
        gathered, radial, parts = gather(which, operands)
        d_first, d_second = rows.new(*rows.first.shape), rows.new(*rows.second.shape)
        d_inv_tau, loss = rows.new(), rows.new()
        unpack_kernel[(triton.cdiv(rows.n, SPAN),)](
            gathered, gathered.stride(0), radial, radial.stride(0), gathered.shape[0],
            parts, parts.shape[0], peaks, peaks.shape[0],
            peaks if totals is None else totals, self.weights.dots, self.weights.dots.shape[0],
            rows.first, rows.second, rows.norm, rows.sim_pos, radial if d_pos is None else d_pos.contiguous(),
            d_first, d_second, d_inv_tau, loss, rows.n_first, rows.n, rows.D, rows.DP, rows.eps,
            weight / _G_SCALE[rows.x.dtype], pos_factor, 0.5 if self.forward.one_side else 1.0, weight,
            self.forward.k, self.forward.bounds[which], *rows.first.stride(), *rows.second.stride(),
            NORMALIZE=rows.normalize, PAIRED=d_pos is not None, LOSS=totals is not None, **self.forward.flags,
            SPAN=SPAN, BLOCK_D=min(rows.DP, 64), num_warps=4,
        )  # fmt: skip
        return d_first, d_second, d_inv_tau, loss

    def _regimes(self) -> list[bool]:
        return [shifted for shifted in (False, True) if self.forward.may_be(direct=not shifted)]

    def _fused(self, which: int, operands: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """gathered and radial, of every part of the columns, and parts of the sum of radial."""
        rows, cols = self.forward.sides[which], self.forward.sides[-1 - which]
        tile = config.tile("fused", rows)
        blocks = triton.cdiv(rows.n, tile.block_m)
        part_cols = config.columns_of_part(config.multiprocessors(rows.x.device), blocks, cols.n, tile.block_n)
        n_parts = triton.cdiv(cols.n, part_cols)
        gathered, radial = rows.new(n_parts, *rows.x.shape), rows.new(n_parts, rows.x.shape[0])
        parts = rows.new(n_parts * blocks)
        for shifted in self._regimes():
            _fused_kernel[(blocks, n_parts)](
                *operands, self.weights.peaks, self.weights.peaks.shape[0],
                gathered, gathered.stride(0), radial, radial.stride(0), parts, part_cols,
                *self.forward.regime(which), rows.DP,
                SHIFTED=shifted, G_SCALE=_G_SCALE[rows.x.dtype], **self.forward.flags, **self.forward.modes,
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=rows.DP, SPAN=SPAN,
                **tile.options,
            )  # fmt: skip
        return gathered, radial, parts

    def _panels(self, which: int, operands: tuple[Tensor | int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The same."""
        rows, cols = self.forward.sides[which], self.forward.sides[-1 - which]
        form, gather = config.tile("form", rows), config.tile("gather", rows)
        g_dtype = torch.float32 if rows.split else rows.x.dtype
        width = cols.x.shape[0]
        highest = max(WORKSPACE // (width * g_dtype.itemsize) // PADDED_ROWS, 1) * PADDED_ROWS
        height = config.height_of_panel(
            config.multiprocessors(rows.x.device), min(highest, rows.x.shape[0]), rows.DP, gather
        )
        g = rows.x.new_empty((height, width), dtype=g_dtype)
        columns = rows.new(width // form.block_n, height)
        gathered, radial = rows.new(1, *rows.x.shape), rows.new(1, rows.x.shape[0])
        parts, largest = rows.new(triton.cdiv(rows.n, gather.block_m)), rows.new()
        _largest_kernel[(1,)](self.weights.peaks, self.weights.peaks.shape[0], largest, num_warps=4)
        for first_row in range(0, rows.n, height):
            n_here = min(height, rows.n - first_row)
            for shifted in self._regimes():
                _form_kernel[(triton.cdiv(n_here, form.block_m), width // form.block_n)](
                    *operands, largest, g, width, columns, height, first_row, *self.forward.regime(which), rows.DP,
                    SHIFTED=shifted, G_SCALE=_G_SCALE[rows.x.dtype], **self.forward.flags, **self.forward.modes,
                    BLOCK_M=form.block_m, BLOCK_N=form.block_n, BLOCK_D=form.block_d, SPAN=SPAN,
                    **form.options,
                )  # fmt: skip
            _gather_kernel[(rows.DP // gather.block_d, triton.cdiv(n_here, gather.block_m))](
                g, width, columns, height, columns.shape[0], first_row, rows.n, cols.x, cols.lo, cols.n, rows.r,
                gathered, radial, parts, rows.DP, **self.forward.modes,
                BLOCK_M=gather.block_m, BLOCK_N=gather.block_n, BLOCK_D=gather.block_d,
                **gather.options,
            )  # fmt: skip
        return gathered, radial, parts
