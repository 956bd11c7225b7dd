"""neg_lse of packed rows: nu_i = log sum over {j : id_j != id_i} of exp(k s_ij).

Direct (`_direct_kernel`): a program owns a square of tiles. Each exponential counts in the sum of its row and in the
sum of its column. So with one side, only tiles on and above the diagonal are computed, and in a tile that the diagonal
crosses, only the part above the diagonal counts. A program writes its sums to planes, which have one element per row.
No two programs write the same element of a plane. The planes are added in a fixed order (finish.py).

    one side, Q x Q squares  for the rows of squares (a, *), plane b >= a has the row sums of square (a, b), plane b < a
                             has the column sums of square (b, a), and plane Q has the column sums of square (a, a)
    two sides                rows: a plane for each column of squares; columns: a plane for each row of squares

The outer loop of a square runs over columns. If a block of columns fits with all its features, it stays in shared
memory while the inner loop runs over the rows. The square then reads x of its columns once, and x of its rows once for
each block of columns. The sums of the columns stay in registers, and the sums of the rows are added up in their plane.

Owned (`_owned_kernel`): a program owns a block of rows and keeps a running maximum over all columns. With two sides, a
second launch computes nu of the columns. This kernel is for similarity limits, for temperatures at which exp would
leave its range, and for small batches, where computing nu in one launch saves more time than skipping half of the
products.

Both kernels have two loops over tiles. One loop compares ids. The other has no mask. It is for squares (in Owned, for
rounds of 1,024 columns) that do not extend past the end of a side, and whose rows and columns have id ranges that do
not overlap.

In some calls only the device knows which kernel is needed (sides.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..base import Upstream
from . import config
from .finish import RowEnds, end_arguments, end_rows, finish
from .pack import SPAN
from .sides import Sides, in_direct_range, load_inverse_temperature
from .tiles import (
    LOG2_E,
    SIZES,
    add_products,
    add_similarities,
    apart,
    disjoint,
    load_limits,
    load_pieces,
    similarities,
    transposed,
    within,
)
from .weights import Weights

ROUND = tl.constexpr(1024)  # `_owned_kernel` decides for this many columns at a time whether they need a mask


@triton.jit
def _square_of(index, squares, ONE_SIDE: tl.constexpr):
    """Return the row and column of a program's square.

    With ONE_SIDE, squares are counted column by column in the upper triangle, else row by row.
    """
    if ONE_SIDE:
        col = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        col = tl.where(col * (col + 1) // 2 > index, col - 1, col)  # correct the rounding of the square root
        col = tl.where((col + 1) * (col + 2) // 2 <= index, col + 1, col)
        return index - col * (col + 1) // 2, col
    return index // squares, index % squares


@triton.jit
def _sum_columns(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr,
    row_plane_ptr, col_plane_ptr, col, row0, end, not_first, n_rows, n_cols, DP, k,
    MASKED: tl.constexpr, ONE_SIDE: tl.constexpr, ROWS_HELD: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr,
):  # fmt: skip
    """Write the sums of BLOCK_N columns over the rows [row0, end), and add their part to the sums of these rows.

    Each thread sums the elements of a column that it holds, over all tiles. The threads' sums are combined once, at the
    end, so only row sums need a reduction in the loop. A row lies in four threads of a warp (mma, wgmma) or in a single
    thread (tensor memory).
    """
    offs_n = col + tl.arange(0, BLOCK_N)
    c_n = tl.load(cols_r_ptr + offs_n) * (k * LOG2_E)
    if WHOLE_D:
        x_n = transposed(load_pieces(cols_x_ptr, cols_lo_ptr, col, 0, BLOCK_D, BLOCK_N, BLOCK_D, SPLIT))
    # If ROWS_HELD is 2, rows r and r + 8 of a tile lie in the same thread.
    sums = tl.zeros((BLOCK_M // (8 * ROWS_HELD), 8, BLOCK_N), tl.float32)
    for row in range(row0, end, BLOCK_M):
        offs_m = row + tl.arange(0, BLOCK_M)
        if WHOLE_D:
            x_m = load_pieces(rows_x_ptr, rows_lo_ptr, row, 0, BLOCK_D, BLOCK_M, BLOCK_D, SPLIT)
            s = add_products(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_m, x_n, SPLIT, TF32, UPCAST)
        else:
            s = similarities(
                rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP,
                SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        exps = tl.exp2(s * c_n[None, :] * tl.load(rows_r_ptr + offs_m)[:, None])
        if MASKED:
            counted = apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N)
            if ONE_SIDE:
                counted &= offs_m[:, None] < offs_n[None, :]
            exps = tl.where(counted, exps, 0.0)
        sums += tl.sum(tl.reshape(exps, (BLOCK_M // (8 * ROWS_HELD), ROWS_HELD, 8, BLOCK_N)), 1)
        before = tl.load(row_plane_ptr + offs_m, mask=not_first, other=0.0)
        tl.store(row_plane_ptr + offs_m, before + tl.sum(exps, 1))
    tl.store(col_plane_ptr + offs_n, tl.sum(tl.sum(sums, 0), 0))
    tl.debug_barrier()  # the next call reads the rows' sums, possibly in threads other than those that wrote them


@triton.jit(do_not_specialize=SIZES)
def _direct_kernel(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    row_planes_ptr, col_planes_ptr, bounds_ptr, n_rows, n_cols, DP, squares, edge, stride_row_plane, stride_col_plane,
    inv_tau, log_terms,
    ONE_SIDE: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr, ROWS_HELD: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = load_inverse_temperature(inv_tau, ON_DEVICE)
    if not in_direct_range(bounds_ptr, k, log_terms, BOUNDED):
        return
    a, b = _square_of(tl.program_id(0), squares, ONE_SIDE)
    on_diagonal = ONE_SIDE & (a == b)
    row_plane_ptr = row_planes_ptr + b.to(tl.int64) * stride_row_plane
    col_plane_ptr = col_planes_ptr + tl.where(on_diagonal, squares, a).to(tl.int64) * stride_col_plane
    row0, col0 = a * edge, b * edge
    whole = (row0 + edge <= n_rows) & (col0 + edge <= n_cols)
    if whole:
        whole = disjoint(rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row0, edge, col0, edge, SPAN)
    if whole:
        for i in range(0, edge, BLOCK_N):
            _sum_columns(
                rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr,
                row_plane_ptr, col_plane_ptr, col0 + i, row0, row0 + edge, i > 0, n_rows, n_cols, DP, k,
                False, ONE_SIDE, ROWS_HELD, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE_D,
            )  # fmt: skip
    else:  # half as wide, because with 64-bit ids a full tile would not fit in the registers
        HALF: tl.constexpr = BLOCK_N // 2
        blocks = tl.cdiv(tl.minimum(edge, n_cols - col0), HALF)
        for i in range(0, blocks):
            col = col0 + (blocks - 1 - i) * HALF  # last block first: the first call must set the sums of all rows
            end = tl.minimum(row0 + edge, tl.minimum(n_rows, col + HALF) if ONE_SIDE else n_rows)
            _sum_columns(
                rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr,
                row_plane_ptr, col_plane_ptr, col, row0, end, i > 0, n_rows, n_cols, DP, k,
                True, ONE_SIDE, ROWS_HELD, SPLIT, TF32, UPCAST, BLOCK_M, HALF, BLOCK_D, WHOLE_D,
            )  # fmt: skip


@triton.jit
def _add_exponentials(
    peaks, sums, x_m, r_m, rows_x_ptr, rows_lo_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr, limits, row, n_rows, n_cols, DP, k,
    MASKED: tl.constexpr, LIMITED: tl.constexpr, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Return the running maxima and sums of BLOCK_M rows after adding some of the columns: if MASKED, the rounds of
    columns that need a mask, else all other rounds.
    """
    for first in range(0, n_cols, ROUND):
        whole = (row + BLOCK_M <= n_rows) & (first + ROUND <= n_cols)
        if whole:
            whole = disjoint(rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row, BLOCK_M, first, ROUND, SPAN)
        if whole != MASKED:
            for col in range(first, tl.minimum(first + ROUND, n_cols), BLOCK_N):
                if WHOLE_D:
                    x_n = load_pieces(cols_x_ptr, cols_lo_ptr, col, 0, BLOCK_D, BLOCK_N, BLOCK_D, SPLIT)
                    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                    s = add_similarities(zeros, x_m, x_n, SPLIT, TF32, UPCAST, LIMITED)
                else:
                    s = similarities(
                        rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP,
                        SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, LIMITED,
                    )  # fmt: skip
                # r_m r_n is multiplied first, so that (i, j) and (j, i) are rounded alike. The backward needs the same
                # logits, because it subtracts nu from them.
                r_n = tl.load(cols_r_ptr + col + tl.arange(0, BLOCK_N))
                s *= r_m[:, None] * r_n[None, :]
                logits = s * k
                if LIMITED:
                    logits = within(logits, s, limits[:, None], -float("inf"))
                if MASKED:
                    counted = apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N)
                    logits = tl.where(counted, logits, -float("inf"))
                new_peaks = tl.maximum(peaks, tl.max(logits, 1))  # max drops a NaN, but the NaN reaches the sum
                shift = tl.where(new_peaks == -float("inf"), 0.0, new_peaks)  # no negative yet: -inf - -inf is NaN
                exps = tl.exp2((logits - shift[:, None]) * LOG2_E)
                sums = sums * tl.exp2((peaks - shift) * LOG2_E) + tl.sum(exps, 1)
                peaks = new_peaks
    return peaks, sums


@triton.jit(do_not_specialize=SIZES)
def _owned_kernel(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    rows_limits_ptr, nu_ptr, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, bounds_ptr, n_rows, n_cols, DP,
    inv_tau, log_terms, limit_scale, limit_shift,
    ALWAYS: tl.constexpr, LOSS: tl.constexpr, LIMITED: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = load_inverse_temperature(inv_tau, ON_DEVICE)
    if not ALWAYS and in_direct_range(bounds_ptr, k, log_terms, BOUNDED):
        return
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    r_m = tl.load(rows_r_ptr + offs_m)
    x_m = load_pieces(rows_x_ptr, rows_lo_ptr, row, 0, BLOCK_D, BLOCK_M, BLOCK_D, SPLIT) if WHOLE_D else ()
    limits = load_limits(rows_limits_ptr, offs_m, n_rows, limit_scale, limit_shift) if LIMITED else r_m
    peaks = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for MASKED in tl.static_range(2):
        peaks, sums = _add_exponentials(
            peaks, sums, x_m, r_m, rows_x_ptr, rows_lo_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
            cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr, limits,
            row, n_rows, n_cols, DP, k,
            MASKED == 1, LIMITED, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE_D, SPAN,
        )  # fmt: skip
    nu = peaks + tl.log(sums)
    tl.store(nu_ptr + offs_m, nu, mask=offs_m < n_rows)
    if LOSS:
        end_rows(nu, pos_ptr, q_ptr, peaks_ptr, totals_ptr, dots_ptr, offs_m, n_rows, k)


def log_sum_exps(sides: Sides) -> list[Tensor]:
    """Return nu of every side."""
    nus = [sides.work.output(side.rows.n) for side in sides.each()]
    _write(sides, nus, None)
    return nus


def losses(sides: Sides) -> tuple[Weights, Tensor]:
    """Return nu of the rows of two views together with the weights q of nu, and partial sums of the losses."""
    nu, q = sides.work.empty(2, sides.rows.r.shape[0]).unbind()
    peaks, totals, dots = sides.work.empty(3, sides.rows.peaks.shape[1]).unbind()
    (programs,) = _write(sides, [nu], RowEnds(q, peaks, totals, dots))
    return Weights(Upstream(q, nu), None, peaks[:programs], dots[:programs]), totals[:programs]


def _write(sides: Sides, nus: list[Tensor], ends: RowEnds | None) -> list[int]:
    """Write nu of every side, and `ends` unless it is None. Return the number of partial results of each side."""
    each = list(zip(sides.each(), nus, strict=True))
    squares = config.choose("direct", sides.rows, sides.longer) is not None and sides.may_be(direct=True)
    if not squares:
        return [_own_rows(side, nu, ends, always=True) for side, nu in each]
    planes = _sum_squares(sides)
    if sides.may_be(direct=False):
        for side, nu in each:
            _own_rows(side, nu, None, always=False)
    return [finish(side, sums, nu, ends) for (side, nu), sums in zip(each, planes, strict=True)]


def _sum_squares(sides: Sides) -> list[Tensor]:
    """Return the planes of sums of every side."""
    rows, cols, new = sides.rows, sides.cols, sides.work.empty
    tile = config.tile("direct", rows, sides.longer)
    edge = config.edge_of_square(rows.n, cols.n, max(tile.block_m, tile.block_n))
    row_squares, col_squares = triton.cdiv(rows.n, edge), triton.cdiv(cols.n, edge)
    if sides.one_side:
        programs = row_squares * (row_squares + 1) // 2
        row_planes = col_planes = new(row_squares + 1, rows.r.shape[0])
    else:
        programs = row_squares * col_squares
        row_planes, col_planes = new(col_squares, rows.r.shape[0]), new(row_squares, cols.r.shape[0])
    sides.work.launch(
        _direct_kernel, (programs,), **rows.operands("rows"), **cols.operands("cols"),
        row_planes_ptr=row_planes, col_planes_ptr=col_planes, DP=rows.DP, squares=col_squares, edge=edge,
        stride_row_plane=row_planes.stride(0), stride_col_plane=col_planes.stride(0), **sides.regime(),
        ONE_SIDE=sides.one_side, ROWS_HELD=config.rows_held(config.chip(rows.x.device)), **sides.modes(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, WHOLE_D=tile.block_d == rows.DP,
        SPAN=SPAN, **tile.options,
    )  # fmt: skip
    return [row_planes] if sides.one_side else [row_planes, col_planes]


def _own_rows(sides: Sides, nu: Tensor, ends: RowEnds | None, *, always: bool) -> int:
    """Write nu of the rows, and `ends` unless it is None. Return the number of programs.

    Unless `always`, the kernel does nothing in the direct regime.
    """
    rows, cols = sides.rows, sides.cols
    tile = config.tile(sides.tiles_as("owned"), rows)
    programs = triton.cdiv(rows.n, tile.block_m)
    sides.work.launch(
        _owned_kernel, (programs,), **rows.operands("rows"), **cols.operands("cols"),
        **end_arguments(rows, nu, ends), DP=rows.DP, **sides.regime(), **sides.limits_of("rows"),
        ALWAYS=always, LOSS=ends is not None, **sides.modes(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d, WHOLE_D=tile.block_d == rows.DP,
        SPAN=SPAN, **tile.options,
    )  # fmt: skip
    return programs
