"""neg_lse of packed rows: nu_i = log sum over {j : id_j != id_i} of exp(k s_ij).

Direct: a program owns a square of tiles. One exponential of a tile serves the sums of its rows and of its columns, so
of one side only tiles on and above the diagonal are formed, and of one that the diagonal crosses the part above it
counts. Sums go to planes that no two programs share, and are added in a fixed order by `_finish_kernel`:

    one side of Q squares    rows of square a: plane b >= a from square (a, b) as rows, plane b < a from (b, a) as
                             columns, plane Q from (a, a) as columns
    two sides                rows: a plane for each square of columns; columns: a plane for each square of rows

Reads x once for each square, writes M sums for each row of squares. Owned: a program owns a block of rows, with a
running maximum over all columns; the columns of a rectangle take a launch of their own. It serves temperatures at which
exp leaves its range, and small batches, where one launch that ends in nu is worth more than half of the products.

Which of the two it is may be known to the device alone: both are launched then, and the one that is not wanted returns
at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import config
from .pack import SPAN, Packed
from .tiles import (
    DIRECT_LIMIT,
    INTERPRETED,
    LOG2_E,
    SIZES,
    add_product,
    in_direct_range,
    inverse_temperature,
    load_rows,
    masked,
    similarities,
    survey_weights,
)

FINISHED = 128  # rows of a program of `_finish_kernel`


@triton.jit
def _square_of(index, SQUARES, ONE_SIDE: tl.constexpr):
    """Row and column of a program's square: of one side by columns of the upper triangle, else row by row."""
    if ONE_SIDE:
        col = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        col = tl.where(col * (col + 1) // 2 > index, col - 1, col)  # the root was rounded
        col = tl.where((col + 1) * (col + 2) // 2 <= index, col + 1, col)
        return index - col * (col + 1) // 2, col
    return index // SQUARES, index % SQUARES


@triton.jit(do_not_specialize=SIZES)
def _direct_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    row_planes, col_planes, s_row_plane, s_col_plane, squares, edge, inv_tau, bounds, log_terms, DP,
    ONE_SIDE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if not in_direct_range(k, bounds, log_terms, BOUNDED):
        return
    a, b = _square_of(tl.program_id(0), squares, ONE_SIDE)
    on_diagonal = ONE_SIDE & (a == b)
    row_plane = row_planes + b.to(tl.int64) * s_row_plane
    col_plane = col_planes + tl.where(on_diagonal, squares, a).to(tl.int64) * s_col_plane
    row0, col0 = a * edge, b * edge
    for i in range(0, tl.cdiv(tl.minimum(edge, n_rows - row0), BLOCK_M)):
        row = row0 + i * BLOCK_M
        offs_m = row + tl.arange(0, BLOCK_M)
        r_m = tl.load(rows_r + offs_m) * (k * LOG2_E)
        if WHOLE_D:
            x_m = load_rows(rows_x, row, 0, DP, BLOCK_M, BLOCK_D)
            lo_m = load_rows(rows_lo, row, 0, DP, BLOCK_M, BLOCK_D) if SPLIT else x_m
        row_sums = tl.zeros((BLOCK_M,), tl.float32)
        first = tl.where(on_diagonal, i * BLOCK_M // BLOCK_N, 0)
        for j in range(first, tl.cdiv(tl.minimum(edge, n_cols - col0), BLOCK_N)):
            col = col0 + j * BLOCK_N
            offs_n = col + tl.arange(0, BLOCK_N)
            if WHOLE_D:
                x_n = load_rows(cols_x, col, 0, DP, BLOCK_N, BLOCK_D)
                lo_n = load_rows(cols_lo, col, 0, DP, BLOCK_N, BLOCK_D) if SPLIT else x_n
                s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                s = add_product(s, x_m, lo_m, tl.trans(x_n), tl.trans(lo_n), SPLIT, TF32, UPCAST)
            else:
                s = similarities(
                    rows_x, rows_lo, cols_x, cols_lo, row, col, DP, BLOCK_M, BLOCK_N, BLOCK_D, SPLIT, TF32, UPCAST
                )
            exps = tl.exp2(s * tl.load(cols_r + offs_n)[None, :] * r_m[:, None])
            exps = masked(
                exps, 0.0, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
                BLOCK_M, BLOCK_N, SPAN,
            )  # fmt: skip
            if on_diagonal & (col < row + BLOCK_M):
                exps = tl.where(offs_m[:, None] < offs_n[None, :], exps, 0.0)
            row_sums += tl.sum(exps, 1)
            before = tl.load(col_plane + offs_n, mask=(offs_n < n_cols) & (i > 0), other=0.0)
            tl.store(col_plane + offs_n, before + tl.sum(exps, 0), mask=offs_n < n_cols)
        tl.store(row_plane + offs_m, row_sums, mask=offs_m < n_rows)
        tl.debug_barrier()  # the next row of tiles reads the columns' sums, not always with the threads that wrote them


@triton.jit
def _end_rows(nu, offs, n, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, k):
    """NT-Xent of a program's rows: their losses log(1 + exp(nu - pos)) in a sum, and q = sigmoid(nu - pos)."""
    inside = offs < n
    sim_pos = tl.load(pos_ptr + offs, mask=inside, other=0.0)
    x = nu - k * sim_pos
    e = tl.exp(-tl.abs(x))
    # log(1 + e) of a small e, to its own relative accuracy: Kahan's quotient.
    grown = 1.0 + e
    log1p = tl.where(grown == 1.0, e, tl.log(grown) * e / tl.where(grown == 1.0, 1.0, grown - 1.0))
    tl.store(totals_ptr + tl.program_id(0), tl.sum(tl.where(inside, tl.maximum(x, 0.0) + log1p, 0.0)))
    q = tl.where(x > 0, 1.0, e) / (1.0 + e)
    tl.store(q_ptr + offs, q, mask=inside)
    survey_weights(q, nu, q * sim_pos, offs, n, peaks_ptr, dots_ptr)


@triton.jit(do_not_specialize=SIZES)
def _owned_kernel(
    rows_x, rows_lo, rows_r, rows_ids, rows_low, rows_high, n_rows,
    cols_x, cols_lo, cols_r, cols_ids, cols_low, cols_high, n_cols,
    nu_ptr, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, inv_tau, bounds, log_terms, DP,
    ALWAYS: tl.constexpr, LOSS: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = inverse_temperature(inv_tau, ON_DEVICE)
    if not ALWAYS and in_direct_range(k, bounds, log_terms, BOUNDED):
        return
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    r_m = tl.load(rows_r + offs_m)
    peaks = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for col in range(0, n_cols, BLOCK_N):
        s = similarities(rows_x, rows_lo, cols_x, cols_lo, row, col, DP, BLOCK_M, BLOCK_N, BLOCK_D, SPLIT, TF32, UPCAST)
        # Rounded the same from both sides: only what went into a sum may be compared with it.
        r_n = tl.load(cols_r + col + tl.arange(0, BLOCK_N))
        logits = s * (r_m[:, None] * r_n[None, :]) * k
        logits = masked(
            logits, -float("inf"), rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols,
            row, col, BLOCK_M, BLOCK_N, SPAN,
        )  # fmt: skip
        new_peaks = tl.maximum(peaks, tl.max(logits, 1))
        shift = tl.where(new_peaks == -float("inf"), 0.0, new_peaks)  # -inf - -inf is NaN: no negative yet
        exps = tl.exp2((logits - shift[:, None]) * LOG2_E)
        sums = sums * tl.exp2((peaks - shift) * LOG2_E) + tl.sum(exps, 1)
        peaks = new_peaks
    nu = peaks + tl.log(sums)
    tl.store(nu_ptr + offs_m, nu, mask=offs_m < n_rows)
    if LOSS:
        _end_rows(nu, offs_m, n_rows, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, k)


@triton.jit(do_not_specialize=SIZES)
def _finish_kernel(
    planes, s_plane, n_planes, nu_ptr, n, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, inv_tau, bounds, log_terms,
    BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, LOSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nu from the planes, if it was direct; and the loss."""
    k = inverse_temperature(inv_tau, ON_DEVICE)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    if in_direct_range(k, bounds, log_terms, BOUNDED):
        sums = tl.zeros((BLOCK,), tl.float32)
        plane = planes + offs
        for _ in range(0, n_planes):
            sums += tl.load(plane, mask=inside, other=0.0)
            plane += s_plane
        nu = tl.log(sums)
        tl.store(nu_ptr + offs, nu, mask=inside)
    else:
        nu = tl.load(nu_ptr + offs, mask=inside, other=0.0)
    if LOSS:
        _end_rows(nu, offs, n, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, k)


def on_device(inv_tau: Tensor) -> bool:
    """Whether the host must not read it."""
    return inv_tau.device.type != "cpu"


class Weights(NamedTuple):
    """Weights of nu of every side, and what programs found in them: the largest, and sums of the positives' weights
    times sim_pos."""

    of_sides: list[Tensor]
    peaks: Tensor
    dots: Tensor


class Forward:
    """nu of one packed side, or of two."""

    def __init__(self, sides: list[Packed], inv_tau: Tensor):
        self.sides = sides
        self.rows, self.cols = sides[0], sides[-1]
        self.one_side = len(sides) == 1
        self.on_device = on_device(inv_tau)
        self.k = inv_tau if self.on_device else inv_tau.item()
        # Rows that are not normalised: the device knows how long they are.
        self.bounded = not self.rows.normalize
        self.bounds = self.rows.bounds(self.cols) if self.bounded else [self.rows.r, self.rows.r]
        self.log_terms = math.log(max(self.rows.n, self.cols.n))
        self.modes = {"SPLIT": self.rows.split, "TF32": self.rows.tf32, "UPCAST": INTERPRETED}
        self.flags = {"BOUNDED": self.bounded, "ON_DEVICE": self.on_device}

    def may_be(self, direct: bool) -> bool:
        """Whether this regime's kernels have to be launched: both, where only the device knows."""
        if self.bounded or self.on_device:
            return True
        margin = DIRECT_LIMIT.value - (self.k + self.log_terms)  # which the device may round to the other side
        return (margin > 0) == direct or abs(margin) < 1e-3

    def regime(self, which: int = 0) -> tuple[Tensor | float, Tensor, float]:
        """What a kernel of side `which` chooses the regime by."""
        return self.k, self.bounds[which], self.log_terms

    def operands(self, side: Packed) -> tuple[Tensor | int, ...]:
        return side.x, side.lo, side.r, side.ids, side.low, side.high, side.n

    def run(self) -> list[Tensor]:
        """nu of every side."""
        nus = [side.new(side.n) for side in self.sides]
        self._run(nus, None)
        return nus

    def losses(self) -> tuple[Tensor, Weights, Tensor]:
        """Of two views: nu, its weights q, and sums of the rows' losses."""
        nu, q = self.rows.new(2, self.rows.r.shape[0]).unbind()
        ends = (q, *self.rows.new(3, self.rows.peaks.shape[1]).unbind())
        programs = self._run([nu], ends)
        peaks, totals, dots = (end[:programs] for end in ends[1:])
        return nu, Weights([q], peaks, dots), totals

    def _run(self, nus: list[Tensor], ends: tuple[Tensor, ...] | None) -> int:
        """Write nu, and what `_end_rows` writes; how many programs ended rows."""
        largest = max(side.n for side in self.sides)
        summed = config.choose("direct", self.rows, largest) is not None and self.may_be(direct=True)
        planes = self._sum() if summed else None
        programs = 0
        if planes is None or self.may_be(direct=False):
            for side, other, nu in zip(self.sides, (self.cols, self.rows), nus, strict=False):
                programs = self._own(side, other, nu, ends, always=planes is None)
        for side, nu, sums in zip(self.sides, nus, planes or (), strict=False):
            programs = triton.cdiv(side.n, FINISHED)
            _finish_kernel[(programs,)](
                sums, sums.stride(0), sums.shape[0], nu, side.n, side.sim_pos, *(ends or [nu] * 4), *self.regime(),
                **self.flags, LOSS=ends is not None, BLOCK=FINISHED, num_warps=4,
            )  # fmt: skip
        return programs

    def _sum(self) -> list[Tensor]:
        tile = config.tile("direct", self.rows, max(side.n for side in self.sides))
        edge = config.edge_of_square(self.rows.n, self.cols.n, max(tile.block_m, tile.block_n))
        row_squares, col_squares = (triton.cdiv(side.n, edge) for side in (self.rows, self.cols))
        if self.one_side:
            planes = [self.rows.new(row_squares + 1, self.rows.r.shape[0])]
            programs = row_squares * (row_squares + 1) // 2
        else:
            planes = [
                self.rows.new(col_squares, self.rows.r.shape[0]),
                self.rows.new(row_squares, self.cols.r.shape[0]),
            ]
            programs = row_squares * col_squares
        _direct_kernel[(programs,)](
            *self.operands(self.rows), *self.operands(self.cols),
            planes[0], planes[-1], planes[0].stride(0), planes[-1].stride(0), col_squares, edge,
            *self.regime(), self.rows.DP, ONE_SIDE=self.one_side, **self.flags, **self.modes,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, WHOLE_D=tile.block_d == self.rows.DP,
            SPAN=SPAN, **tile.options,
        )  # fmt: skip
        return planes

    def _own(self, side: Packed, other: Packed, nu: Tensor, ends: tuple[Tensor, ...] | None, always: bool) -> int:
        tile = config.tile("owned", side)
        programs = triton.cdiv(side.n, tile.block_m)
        _owned_kernel[(programs,)](
            *self.operands(side), *self.operands(other), nu, side.sim_pos, *(ends or [nu] * 4), *self.regime(),
            side.DP, ALWAYS=always, LOSS=always and ends is not None, **self.flags, **self.modes,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, SPAN=SPAN,
            **tile.options,
        )  # fmt: skip
        return programs
