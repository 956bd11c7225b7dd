"""The sums `gathered` and `radial` (see backward.py), for rows with so many features that no program can hold the sums
of a row block.

G goes through memory, two squares at a time. Two squares are small enough to stay in the L2 cache. `_form_kernel`
writes the two squares, one above the other. `_gather_kernel` multiplies them with their columns and adds the result to
the sums from the earlier squares, in a fixed order.

    one side    G is symmetric: a square (a, b) above the diagonal is computed once and written twice, for the rows of
                a and, transposed, for the rows of b. The squares on the diagonal come first, two at a time: (a, a) and
                (a + 1, a + 1)
    two sides   (a, b) and (a + 1, b), for one block of columns b after the other

With u = 2 M^2 D flops for a full product, the gradient costs 1.5u in a call with one side. Because u_j = r_j x_j, the
operand that multiplies x_j is G_ij r_j. The transposed copy multiplies x_i, so its operand is G_ij r_i, and it must be
written separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import config
from .pack import PADDED_ROWS, SPAN
from .sides import Sides, in_direct_range, largest_scale, load_inverse_temperature
from .tiles import (
    SIZES,
    add_in_units,
    add_product,
    in_two_parts,
    in_units,
    load_limits,
    load_rows,
    masked,
    rounded,
    similarities,
    store_rows,
    weigh,
    weigh_within,
)
from .unpack import Gathered
from .weights import TileWeights


class Squares(NamedTuple):
    """Two squares of G, given by their first rows and columns.

    mirrored: the second square is the transpose of the first. add: add to the sums that the rows already have.
    """

    row_0: int
    col_0: int
    row_1: int
    col_1: int
    mirrored: bool
    add: bool


@triton.jit(do_not_specialize=SIZES)
def _form_kernel(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    rows_w_ptr, cols_w_ptr, rows_limits_ptr, cols_limits_ptr, g_ptr, parts_ptr, bounds_ptr,
    n_rows, n_cols, DP, row_0, col_0, row_1, col_1, mirrored, stride_rows_w, stride_cols_w, stride_g,
    inv_tau, log_terms, limit_scale, limit_shift,
    LIMITED: tl.constexpr, SHIFTED: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr, PADDED_ROWS: tl.constexpr,
):  # fmt: skip
    """Write a tile of G for one or both squares, and its part of sum_j G_ij s_ij / r_i.

    Each column is multiplied by its r divided by R (`largest_scale`). The programs for one column of tiles run at about
    the same time, so they share x of their rows and columns in the L2 cache.
    """
    k = load_inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(bounds_ptr, k, log_terms, BOUNDED) == SHIFTED:
        return
    down, across = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    second = down >= stride_g
    row, col = tl.where(second, row_1 - stride_g, row_0) + down, tl.where(second, col_1, col_0) + across
    if (row >= tl.cdiv(n_rows, PADDED_ROWS) * PADDED_ROWS) | (col >= tl.cdiv(n_cols, PADDED_ROWS) * PADDED_ROWS):
        return
    s = similarities(
        rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP,
        SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, LIMITED,
    )  # fmt: skip
    of_row, of_col = rows_w_ptr + row + tl.arange(0, BLOCK_M), cols_w_ptr + col + tl.arange(0, BLOCK_N)
    r_m, r_n = tl.load(of_row + stride_rows_w), tl.load(of_col + stride_cols_w)
    from_m = tl.load(rows_r_ptr + row + tl.arange(0, BLOCK_M)) * largest_scale(bounds_ptr, BOUNDED)
    a_m, nu_m = tl.load(of_row), tl.load(of_row + 3 * stride_rows_w)
    a_n, nu_n = tl.load(of_col), tl.load(of_col + 3 * stride_cols_w)
    one = tl.full((BLOCK_N,), 1.0, tl.float32)
    if LIMITED:
        limits_m = load_limits(rows_limits_ptr, row + tl.arange(0, BLOCK_M), n_rows, limit_scale, limit_shift)
        limits_n = load_limits(cols_limits_ptr, col + tl.arange(0, BLOCK_N), n_cols, limit_scale, limit_shift)
        g = weigh_within(s, from_m, a_m, nu_m, limits_m, r_n, a_n, nu_n, limits_n, one, k)
    else:
        g = weigh(s, from_m, a_m, nu_m, r_n, a_n, nu_n, one, k, SHIFTED)
    g = masked(
        g, rows_ids_ptr, rows_low_ptr, rows_high_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
        row, col, n_rows, n_cols, 0.0, BLOCK_M, BLOCK_N, SPAN,
    )  # fmt: skip
    offs_m, offs_n = down + tl.arange(0, BLOCK_M), across + tl.arange(0, BLOCK_N)
    wide_m, wide_n = offs_m.to(tl.int64) * stride_g, (stride_g + offs_n).to(tl.int64) * stride_g
    of_rows = g * r_n[None, :]
    tl.store(parts_ptr + across // BLOCK_N * 2 * stride_g + offs_m, tl.sum(s * of_rows, 1))
    tl.store(g_ptr + wide_m[:, None] + offs_n[None, :], rounded(of_rows, g_ptr.dtype.element_ty, UPCAST))
    if mirrored:
        of_cols = g * r_m[:, None]
        tl.store(parts_ptr + (down // BLOCK_M * 2 + 1) * stride_g + offs_n, tl.sum(s * of_cols, 0))
        of_cols = rounded(of_cols, g_ptr.dtype.element_ty, UPCAST)
        tl.store(g_ptr + wide_n[:, None] + offs_m[None, :], tl.trans(of_cols))


@triton.jit(do_not_specialize=SIZES)
def _gather_kernel(
    rows_r_ptr, cols_x_ptr, cols_lo_ptr, g_ptr, parts_ptr, gathered_ptr, radial_ptr, radial_parts_ptr,
    n_rows, n_cols, DP, row_0, col_0, row_1, col_1, n_parts_0, n_parts_1, add, stride_g, stride_radial,
    SUMS: tl.constexpr, IN_UNITS: tl.constexpr, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Multiply two squares of G with their columns, for a block of rows and features.

    The programs for one block of rows run at about the same time, so they share G of these rows in the L2 cache. Each
    row has SUMS sums; the first one is radial. With IN_UNITS, each row of a tile of G is divided by a power of two near
    its largest element before the product.
    """
    down, d = tl.program_id(1) * BLOCK_M, tl.program_id(0) * BLOCK_D
    second = down >= stride_g
    row, first_col = tl.where(second, row_1 - stride_g, row_0) + down, tl.where(second, col_1, col_0)
    if row >= n_rows:
        return
    offs_h, offs_n = down + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    from_col = (first_col + offs_n).to(tl.int64)[:, None] * DP + (d + tl.arange(0, BLOCK_D))[None, :]
    g_tile, x_tile, lo_tile = (
        g_ptr + offs_h.to(tl.int64)[:, None] * stride_g + offs_n[None, :],
        cols_x_ptr + from_col,
        cols_lo_ptr + from_col,
    )
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if add:
        acc = load_rows(gathered_ptr, row, d, DP, BLOCK_M, BLOCK_D)
    for _ in range(0, tl.minimum(stride_g, n_cols - first_col), BLOCK_N):
        x_n = tl.load(x_tile)
        lo_n = tl.load(lo_tile) if SPLIT else x_n
        if IN_UNITS:
            high, low, units = in_units(tl.load(g_tile), x_n.dtype, SPLIT, UPCAST)
            acc = add_in_units(acc, high, low, units, x_n, lo_n, SPLIT, TF32, UPCAST)
        else:
            high, low = in_two_parts(tl.load(g_tile), x_n.dtype, SPLIT, UPCAST)
            acc = add_product(acc, high, low, x_n, lo_n, SPLIT, TF32, UPCAST)
        g_tile += BLOCK_N
        x_tile += BLOCK_N * DP
        lo_tile += BLOCK_N * DP
    store_rows(gathered_ptr, acc, row, d, DP, BLOCK_M, BLOCK_D)
    if d == 0:
        offs_m = row + tl.arange(0, BLOCK_M)
        for i in tl.static_range(SUMS):
            sums = tl.zeros((BLOCK_M,), tl.float32)
            part = parts_ptr + 2 * i * stride_g + offs_h
            for _ in range(0, tl.where(second, n_parts_1, n_parts_0)):
                sums += tl.load(part)
                part += 2 * SUMS * stride_g
            if i == 0:
                sums *= tl.load(rows_r_ptr + offs_m)
            sums = tl.where(offs_m < n_rows, sums, 0.0)
            if add:
                sums += tl.load(radial_ptr + i * stride_radial + offs_m)
                tl.debug_barrier()  # several threads may read a row's sum before one of them stores it
            tl.store(radial_ptr + i * stride_radial + offs_m, sums)
            tl.store(radial_parts_ptr + i * tl.cdiv(n_rows, BLOCK_M) + row // BLOCK_M, tl.sum(sums))


def schedule(n_rows: int, n_cols: int, edge: int, one_side: bool) -> Iterator[Squares]:
    """Yield all of G, two squares at a time."""
    if one_side:
        for row in range(0, n_rows, 2 * edge):
            yield Squares(row, row, row + edge, row + edge, mirrored=False, add=False)
        for row in range(0, n_rows, edge):
            for col in range(row + edge, n_rows, edge):
                yield Squares(row, col, col, row, mirrored=True, add=True)
    else:
        for col in range(0, n_cols, edge):
            for row in range(0, n_rows, 2 * edge):
                yield Squares(row, col, row + edge, col, mirrored=False, add=col > 0)


def gather(sides: Sides, weights: TileWeights) -> Gathered:
    """Return gathered and radial of the rows."""

    def form(grid: tuple[int, int], **given: Any) -> None:
        for shifted in sides.shifts():
            sides.work.launch(
                _form_kernel, grid, **given, rows_w_ptr=weights.rows_w, cols_w_ptr=weights.cols_w,
                stride_rows_w=weights.rows_w.stride(0), stride_cols_w=weights.cols_w.stride(0), **sides.regime(),
                **sides.limits_of("rows", "cols"), SHIFTED=shifted,
            )  # fmt: skip

    rows = sides.rows
    dtype = torch.float32 if rows.split else rows.x.dtype
    found = gather_formed(sides, form, dtype, tiles=sides.tiles_as("form"))
    return found._replace(radial_parts=found.radial_parts[0])


def gather_formed(
    sides: Sides,
    form: Callable[..., None],
    dtype: torch.dtype,
    *,
    tiles: str,
    sums: int = 1,
    in_units: bool = False,
) -> Gathered:
    """Return gathered, and `sums` sums of each row. The first sum is radial.

    `form` launches a kernel that writes two squares of G. `tiles` is the name of this kernel's tiles in the table.
    """
    rows, cols, new = sides.rows, sides.cols, sides.work.empty
    tile, multiply = config.tile(tiles, rows), config.tile("gather", rows)
    multiprocessors = config.multiprocessors(rows.x.device)
    edge = config.edge_of_panel(multiprocessors, sides.longer, rows.DP, dtype.itemsize, multiply)
    g = new(2 * edge, edge, dtype=dtype)
    tiles_down, tiles_across = triton.cdiv(edge, tile.block_m), triton.cdiv(edge, tile.block_n)
    parts = new(max(tiles_down, tiles_across), sums, 2 * edge)
    gathered = Gathered(
        new(1, *rows.x.shape), new(sums, rows.x.shape[0]), new(sums, triton.cdiv(rows.n, multiply.block_m))
    )
    padded_cols = triton.cdiv(cols.n, PADDED_ROWS) * PADDED_ROWS  # `form` writes this many columns in all
    for squares in schedule(rows.n, cols.n, edge, sides.one_side):
        places = {"row_0": squares.row_0, "col_0": squares.col_0, "row_1": squares.row_1, "col_1": squares.col_1}
        written = 2 if squares.mirrored or squares.row_1 < rows.n else 1
        formed = 1 if squares.mirrored else written
        parts_0 = triton.cdiv(min(edge, padded_cols - squares.col_0), tile.block_n)
        parts_1 = triton.cdiv(min(edge, padded_cols - squares.col_1), tile.block_n)
        form(
            (formed * tiles_down, tiles_across), **rows.operands("rows"), **cols.operands("cols"),
            g_ptr=g, parts_ptr=parts, DP=rows.DP, **places, mirrored=squares.mirrored, stride_g=edge, **sides.modes(),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=tile.block_d,
            SPAN=SPAN, PADDED_ROWS=PADDED_ROWS, **tile.options,
        )  # fmt: skip
        sides.work.launch(
            _gather_kernel, (rows.DP // multiply.block_d, written * triton.cdiv(edge, multiply.block_m)),
            rows_r_ptr=rows.r, cols_x_ptr=cols.x, cols_lo_ptr=cols.lo, g_ptr=g, parts_ptr=parts,
            gathered_ptr=gathered.sums, radial_ptr=gathered.radial, radial_parts_ptr=gathered.radial_parts,
            n_rows=rows.n, n_cols=cols.n, DP=rows.DP, **places,
            n_parts_0=parts_0, n_parts_1=tiles_down if squares.mirrored else parts_1, add=squares.add, stride_g=edge,
            stride_radial=gathered.radial.stride(0), SUMS=sums, IN_UNITS=in_units, **sides.modes(),
            BLOCK_M=multiply.block_m, BLOCK_N=multiply.block_n, BLOCK_D=multiply.block_d, **multiply.options,
        )  # fmt: skip
    return gathered
