"""The O(M^2 D) part of the gradient of sum_i w_i nu_i, for one side of packed rows.

    P_ij = exp(k s_ij - nu_i), or 0 within a group      G_ij = w_i P_ij + w_j P_ji
    gathered_i = sum_j G_ij u_j                         radial_i = sum_j G_ij s_ij

`unpack.py` turns gathered and radial into the gradients with respect to z and k. radial is summed in float32 before G
is rounded to the dtype of the operands. A float32 row is stored as two float16 parts (SPLIT, unless TF32 is allowed).
G then keeps 22 bits, so `_fused_kernel` computes radial from gathered instead. There are no atomic additions.

If `gathered` fits into registers for all features of a block of rows, `_fused_kernel` computes it. A program owns a
block of rows. It computes a tile of G, rounds the tile, and multiplies it with the columns while their x is still
loaded, so it loads x of each column only once. In small batches a program processes only a part of the columns, to keep
every multiprocessor busy, and `unpack.py` adds the parts in a fixed order. If `gathered` does not fit into registers,
squares of G go through memory (panels.py).

As in the forward, there are two regimes (sides.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import config, panels
from .pack import SPAN
from .sides import Sides, in_direct_range, largest_scale, load_inverse_temperature
from .tiles import (
    SIZES,
    add_dots,
    add_similarities,
    add_tile,
    apart,
    column_of_tile,
    columns_that_meet,
    in_two_parts,
    load_limits,
    load_pieces,
    store_rows,
    tiles_of,
    weigh,
    weigh_within,
)
from .unpack import Gathered, Gradients, unpack_gradients
from .weights import TileWeights


@triton.jit
def _add_weighted_columns(
    gathered, radial, x_m, r_m, a_m, nu_m, limits_m,
    rows_ids_ptr, cols_x_ptr, cols_lo_ptr, cols_ids_ptr, cols_w_ptr, cols_limits_ptr,
    row, order, tiles, n_rows, n_cols, stride_cols_w, k, limit_scale, limit_shift,
    MASKED: tl.constexpr, LIMITED: tl.constexpr, SHIFTED: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return gathered and radial with some tiles of columns added."""
    for tile in range(tiles):
        col = column_of_tile(tile, order, BLOCK_N)
        of_col = cols_w_ptr + col + tl.arange(0, BLOCK_N)
        x_n = load_pieces(cols_x_ptr, cols_lo_ptr, col, 0, BLOCK_D, BLOCK_N, BLOCK_D, SPLIT)
        r_n, a_n = tl.load(of_col + stride_cols_w), tl.load(of_col + 2 * stride_cols_w)
        nu_n = tl.load(of_col + 3 * stride_cols_w) if SHIFTED else a_n
        s = add_similarities(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_m, x_n, SPLIT, TF32, UPCAST, LIMITED)
        if LIMITED:
            limits_n = load_limits(cols_limits_ptr, col + tl.arange(0, BLOCK_N), n_cols, limit_scale, limit_shift)
            g = weigh_within(s, r_m, a_m, nu_m, limits_m, r_n, a_n, nu_n, limits_n, r_n, k)
        else:
            g = weigh(s, r_m, a_m, nu_m, r_n, a_n, nu_n, r_n, k, SHIFTED)
        if MASKED:
            g = tl.where(apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N), g, 0.0)
        if not SPLIT:
            radial = tl.fma(s, g, radial)
        g_high, g_low = in_two_parts(g, cols_x_ptr.dtype.element_ty, SPLIT, UPCAST)
        gathered = add_tile(gathered, g_high, g_low, x_n, SPLIT, TF32, UPCAST)
    return gathered, radial


@triton.jit(do_not_specialize=SIZES)
def _fused_kernel(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    rows_w_ptr, cols_w_ptr, rows_limits_ptr, cols_limits_ptr, gathered_ptr, radial_ptr, radial_parts_ptr, bounds_ptr,
    n_rows, n_cols, part_cols, middle, stride_rows_w, stride_cols_w, stride_gathered, stride_radial,
    inv_tau, log_terms, limit_scale, limit_shift,
    LIMITED: tl.constexpr, SHIFTED: tl.constexpr, BOUNDED: tl.constexpr, ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k = load_inverse_temperature(inv_tau, ON_DEVICE)
    if in_direct_range(bounds_ptr, k, log_terms, BOUNDED) == SHIFTED:
        return
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    largest_r = largest_scale(bounds_ptr, BOUNDED)
    r_m = tl.load(rows_r_ptr + offs_m) * largest_r  # the columns' r are stored divided by largest_r
    a_m, nu_m = tl.load(rows_w_ptr + offs_m), tl.load(rows_w_ptr + 3 * stride_rows_w + offs_m)
    limits_m = load_limits(rows_limits_ptr, offs_m, n_rows, limit_scale, limit_shift) if LIMITED else r_m
    x_m = load_pieces(rows_x_ptr, rows_lo_ptr, row, 0, BLOCK_D, BLOCK_M, BLOCK_D, SPLIT)
    WIDTH: tl.constexpr = BLOCK_D // len(x_m)
    gathered = ()
    for _ in tl.static_range(len(x_m)):
        gathered += (tl.zeros((BLOCK_M, WIDTH), tl.float32),)
    radial = tl.zeros((BLOCK_M, 1 if SPLIT else BLOCK_N), tl.float32)  # one sum per column avoids shuffles in the loop

    part = tl.program_id(1)
    first = part * part_cols
    columns = columns_that_meet(
        rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row, first, tl.minimum(first + part_cols, n_cols),
        middle, BLOCK_M, BLOCK_N, SPAN,
    )  # fmt: skip
    order, n_tiles = tiles_of(columns, False, BLOCK_N)
    gathered, radial = _add_weighted_columns(
        gathered, radial, x_m, r_m, a_m, nu_m, limits_m,
        rows_ids_ptr, cols_x_ptr, cols_lo_ptr, cols_ids_ptr, cols_w_ptr, cols_limits_ptr,
        row, order, n_tiles, n_rows, n_cols, stride_cols_w, k, limit_scale, limit_shift,
        False, LIMITED, SHIFTED, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    order, n_tiles = tiles_of(columns, True, BLOCK_N)
    gathered, radial = _add_weighted_columns(
        gathered, radial, x_m, r_m, a_m, nu_m, limits_m,
        rows_ids_ptr, cols_x_ptr, cols_lo_ptr, cols_ids_ptr, cols_w_ptr, cols_limits_ptr,
        row, order, n_tiles, n_rows, n_cols, stride_cols_w, k, limit_scale, limit_shift,
        True, LIMITED, SHIFTED, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    radial = tl.sum(radial, 1)
    if SPLIT:  # G has 22 bits, enough to compute radial as x times gathered
        radial = add_dots(radial, gathered, rows_x_ptr, rows_lo_ptr, row, part_cols, BLOCK_M, BLOCK_D, SPLIT)
    radial = tl.where(offs_m < n_rows, radial * (r_m / largest_r), 0.0)
    tl.store(radial_ptr + part * stride_radial + offs_m, radial)
    tl.store(radial_parts_ptr + part * tl.num_programs(0) + tl.program_id(0), tl.sum(radial))
    gathered_ptr += part.to(tl.int64) * stride_gathered
    for i in tl.static_range(len(x_m)):
        store_rows(gathered_ptr, gathered[i], row, i * WIDTH, BLOCK_D, BLOCK_M, WIDTH)


def gradient(
    sides: Sides,
    weights: TileWeights,
    *,
    d_pos: Tensor | None = None,
    weight: float = 1.0,
    pos_factor: float = 1.0,
    totals: Tensor | None = None,
) -> Gradients:
    """Return the gradients with respect to the rows' two matrices (`first` and `second`) and to k, and, if `totals` is
    given, the loss: `weight` times the sum of `totals`.

    `weight` multiplies G and the loss, and `pos_factor` multiplies `d_pos`, the weights of the positives.
    """
    fused = config.choose(sides.tiles_as("fused"), sides.rows) is not None
    gathered = _gather_fused(sides, weights) if fused else panels.gather(sides, weights)
    return unpack_gradients(sides, weights, gathered, d_pos=d_pos, weight=weight, pos_factor=pos_factor, totals=totals)


def _gather_fused(sides: Sides, weights: TileWeights) -> Gathered:
    """Return gathered and radial for every part of the columns."""
    rows, cols, new = sides.rows, sides.cols, sides.work.empty
    tile = config.tile(sides.tiles_as("fused"), rows)
    blocks = triton.cdiv(rows.n, tile.block_m)
    part_cols = config.columns_of_part(config.multiprocessors(rows.x.device), blocks, cols.n, tile.block_n)
    n_parts = triton.cdiv(cols.n, part_cols)
    gathered = Gathered(new(n_parts, *rows.x.shape), new(n_parts, rows.x.shape[0]), new(n_parts * blocks))
    for shifted in sides.shifts():
        sides.work.launch(
            _fused_kernel, (blocks, n_parts), **rows.operands("rows"), **cols.operands("cols"),
            rows_w_ptr=weights.rows_w, cols_w_ptr=weights.cols_w,
            gathered_ptr=gathered.sums, radial_ptr=gathered.radial, radial_parts_ptr=gathered.radial_parts,
            part_cols=part_cols, middle=cols.n_first,
            stride_rows_w=weights.rows_w.stride(0), stride_cols_w=weights.cols_w.stride(0),
            stride_gathered=gathered.sums.stride(0), stride_radial=gathered.radial.stride(0),
            **sides.limits_of("rows", "cols"), **sides.regime(), SHIFTED=shifted, **sides.modes(),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=rows.DP, SPAN=SPAN, **tile.options,
        )  # fmt: skip
    return gathered
