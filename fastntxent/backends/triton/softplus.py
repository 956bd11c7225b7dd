"""Sums of softplus over pairs and their gradients, the core of sigmoid losses.

    x_ij = k s_ij + b      y_ij = 1 if i and j are in different groups, else -1
    sum_i = sum_j log(1 + exp(y_ij x_ij))      over other groups, and with POSITIVES also over i's group

With one side, row i itself is left out. The gradient does not depend on a row's sum, so one pass over the tiles of x
computes sums and gradients. With weights a_i of the rows' sums and c_j of the columns' sums (a_j if there is one side):

    G_ij = (a_i + c_j) y_ij sigmoid(y_ij x_ij)      gathered_i = sum_j G_ij u_j      radial_i = sum_j G_ij s_ij

`unpack.py` turns gathered and radial into gradients. d/db is the sum of G, or half of this sum if there is one side. A
program owns a block of rows and processes all columns or a part of them. With two sides, each side's gradient needs a
launch in which that side provides the rows. With u = 2 M K D flops the cost is u for the values alone, 2u with the
gradient of one side, and 4u with the gradients of two. If the gathered rows of a block do not fit into registers, G
goes through memory (panels.py).

G may be tiny everywhere, and its scale is not known beforehand. So if G becomes a float16 operand, each row of a tile
of G is divided by a power of two near the row's largest element. The multiply-add that adds the tile's product to the
sum multiplies the product by this power again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, panels
from .pack import SPAN
from .sides import Sides, load_inverse_temperature
from .tiles import (
    LOG2_E,
    SIZES,
    add_dots,
    add_in_units,
    add_similarities,
    add_tile,
    apart,
    column_of_tile,
    columns_that_meet,
    in_two_parts,
    in_units,
    load_pieces,
    rounded,
    similarities,
    span,
    store_rows,
    sum_of_parts,
    tiles_of,
)
from .unpack import Gathered

LANES = tl.constexpr(8)  # partial sums per row in the loop: with mma and wgmma, columns 8 apart lie in one thread
SUMS = tl.constexpr(3)  # sums per row in a panel: radial, the sum of softplus, and the sum of G
ENDED = 128  # rows per program of `_end_kernel`


@triton.jit
def _then(polynomial, e, coefficient: tl.constexpr):
    """Return polynomial * e + coefficient, a step of Horner's scheme."""
    return tl.fma(polynomial, e, tl.full(e.shape, coefficient, tl.float32))


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) to full relative accuracy, and its slope 1 / (1 + exp(-x))."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    # The minimax polynomial of this degree for log(1 + e) / e on [0, 1]; its relative error is 3e-8.
    series = _then(tl.full(x.shape, 0.0052326940931379795, tl.float32), e, -0.02950523979961872)
    series = _then(series, e, 0.07822595536708832)
    series = _then(series, e, -0.13663245737552643)
    series = _then(series, e, 0.19106006622314453)
    series = _then(series, e, -0.2484298199415207)
    series = _then(series, e, 0.3331909775733948)
    series = _then(series, e, -0.4999949336051941)
    series = _then(series, e, 0.9999999403953552)
    inverse = 1.0 / (1.0 + e)
    # The maximum drops a NaN, but e still contains it.
    return tl.fma(e, series, tl.maximum(x, 0.0)), tl.where(x > 0, inverse, e * inverse)


@triton.jit
def softplus_of_pairs(
    s, r_m, r_n, rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, k, b,
    MASKED: tl.constexpr, POSITIVES: tl.constexpr, ONE_SIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return log(1 + exp(y x)) and y sigmoid(y x), given s, a tile of products of packed rows.

    With MASKED both are 0 for pairs that do not count. Without MASKED the tile must have no such pairs and no pairs
    within a group.
    """
    x = tl.fma(s * r_n[None, :], tl.broadcast_to((r_m * k)[:, None], s.shape), tl.full(s.shape, 0.0, tl.float32) + b)
    if MASKED:
        counted = apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N)
        if POSITIVES:
            offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
            inside = (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]
            if ONE_SIDE:
                inside &= offs_m[:, None] != offs_n[None, :]
            sign = tl.where(counted, 1.0, -1.0)
            x *= sign
    values, slopes = softplus(x)
    if MASKED:
        if POSITIVES:
            slopes *= sign
            counted = inside
        values, slopes = tl.where(counted, values, 0.0), tl.where(counted, slopes, 0.0)
    return values, slopes


@triton.jit
def _in_lanes(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return each row's partial sums over every eighth column. These lie in one thread, so no shuffle is needed."""
    return tl.sum(tl.reshape(tile, (BLOCK_M, BLOCK_N // LANES, LANES)), 1)


@triton.jit
def _add_pairs(
    gathered, radial, sums, slopes, x_m, r_m, w_m, rows_x_ptr, rows_lo_ptr, rows_ids_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_w_ptr, row, order, tiles, n_rows, n_cols, DP, k, b,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
    POSITIVES: tl.constexpr, ONE_SIDE: tl.constexpr, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr,
):  # fmt: skip
    """Return gathered, radial, and the sums of softplus and of G, with some tiles of columns added."""
    for tile in range(tiles):
        col = column_of_tile(tile, order, BLOCK_N)
        offs_n = col + tl.arange(0, BLOCK_N)
        if WHOLE_D:
            x_n = load_pieces(cols_x_ptr, cols_lo_ptr, col, 0, BLOCK_D, BLOCK_N, BLOCK_D, SPLIT)
            s = add_similarities(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x_m, x_n, SPLIT, TF32, UPCAST)
        else:
            s = similarities(
                rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP,
                SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        r_n = tl.load(cols_r_ptr + offs_n)
        values, g = softplus_of_pairs(
            s, r_m, r_n, rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, k, b,
            MASKED, POSITIVES, ONE_SIDE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        sums += _in_lanes(values, BLOCK_M, BLOCK_N)
        if GRADIENT:
            if WEIGHTED:
                w_n = tl.load(cols_w_ptr + offs_n, mask=offs_n < n_cols, other=0.0)
                g *= w_m[:, None] + w_n[None, :]
            slopes += _in_lanes(g, BLOCK_M, BLOCK_N)
            g *= r_n[None, :]
            if not SPLIT:
                radial += _in_lanes(s * g, BLOCK_M, BLOCK_N)
            if cols_x_ptr.dtype.element_ty == tl.float16:
                g_high, g_low, units = in_units(g, tl.float16, SPLIT, UPCAST)
                more = ()
                for i in tl.static_range(len(x_n)):
                    x, lo = x_n[i]
                    more += (add_in_units(gathered[i], g_high, g_low, units, x, lo, SPLIT, TF32, UPCAST),)
                gathered = more
            else:
                g_high, g_low = in_two_parts(g, cols_x_ptr.dtype.element_ty, SPLIT, UPCAST)
                gathered = add_tile(gathered, g_high, g_low, x_n, SPLIT, TF32, UPCAST)
    return gathered, radial, sums, slopes


@triton.jit(do_not_specialize=SIZES)
def _pairs_kernel(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    rows_w_ptr, cols_w_ptr, gathered_ptr, radial_ptr, radial_parts_ptr, sums_ptr, totals_ptr, slopes_ptr,
    n_rows, n_cols, DP, part_cols, middle, stride_gathered, stride_radial, stride_sums, inv_tau, bias,
    GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr, POSITIVES: tl.constexpr, ONE_SIDE: tl.constexpr,
    ON_DEVICE: tl.constexpr, BIAS_ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    k, b = load_inverse_temperature(inv_tau, ON_DEVICE), tl.load(bias) if BIAS_ON_DEVICE else bias
    row = tl.program_id(0) * BLOCK_M
    offs_m = row + tl.arange(0, BLOCK_M)
    r_m = tl.load(rows_r_ptr + offs_m)
    w_m = tl.load(rows_w_ptr + offs_m, mask=offs_m < n_rows, other=0.0) if WEIGHTED else r_m
    x_m = load_pieces(rows_x_ptr, rows_lo_ptr, row, 0, BLOCK_D, BLOCK_M, BLOCK_D, SPLIT) if WHOLE_D else ()
    gathered = ()
    if GRADIENT:
        WIDTH: tl.constexpr = BLOCK_D // len(x_m)
        for _ in tl.static_range(len(x_m)):
            gathered += (tl.zeros((BLOCK_M, WIDTH), tl.float32),)
    radial = tl.zeros((BLOCK_M, LANES), tl.float32)
    sums = tl.zeros((BLOCK_M, LANES), tl.float32)
    slopes = tl.zeros((BLOCK_M, LANES), tl.float32)

    part = tl.program_id(1)
    first = part * part_cols
    columns = columns_that_meet(
        rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row, first, tl.minimum(first + part_cols, n_cols),
        middle, BLOCK_M, BLOCK_N, SPAN,
    )  # fmt: skip
    order, n_tiles = tiles_of(columns, False, BLOCK_N)
    gathered, radial, sums, slopes = _add_pairs(
        gathered, radial, sums, slopes, x_m, r_m, w_m, rows_x_ptr, rows_lo_ptr, rows_ids_ptr,
        cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_w_ptr,
        row, order, n_tiles, n_rows, n_cols, DP, k, b,
        False, GRADIENT, WEIGHTED, POSITIVES, ONE_SIDE, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE_D,
    )  # fmt: skip
    order, n_tiles = tiles_of(columns, True, BLOCK_N)
    gathered, radial, sums, slopes = _add_pairs(
        gathered, radial, sums, slopes, x_m, r_m, w_m, rows_x_ptr, rows_lo_ptr, rows_ids_ptr,
        cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_w_ptr,
        row, order, n_tiles, n_rows, n_cols, DP, k, b,
        True, GRADIENT, WEIGHTED, POSITIVES, ONE_SIDE, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D, WHOLE_D,
    )  # fmt: skip
    inside, program = offs_m < n_rows, part * tl.num_programs(0) + tl.program_id(0)
    of_rows = tl.where(inside, tl.sum(sums, 1), 0.0)
    tl.store(sums_ptr + part * stride_sums + offs_m, of_rows)
    tl.store(totals_ptr + program, tl.sum(of_rows))
    if GRADIENT:
        tl.store(slopes_ptr + program, tl.sum(tl.where(inside, tl.sum(slopes, 1), 0.0)))
        dots = tl.sum(radial, 1)
        if SPLIT:  # G has 22 bits, enough to compute radial as x times gathered
            dots = add_dots(dots, gathered, rows_x_ptr, rows_lo_ptr, row, part_cols, BLOCK_M, BLOCK_D, SPLIT)
        dots = tl.where(inside, dots * r_m, 0.0)
        tl.store(radial_ptr + part * stride_radial + offs_m, dots)
        tl.store(radial_parts_ptr + program, tl.sum(dots))
        gathered_ptr += part.to(tl.int64) * stride_gathered
        for i in tl.static_range(len(x_m)):
            store_rows(gathered_ptr, gathered[i], row, i * WIDTH, BLOCK_D, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=SIZES)
def _end_kernel(
    planes_ptr, totals_ptr, slopes_ptr, sums_ptr, loss_ptr, d_bias_ptr, n, n_planes, n_totals, stride_plane,
    factor, loss_factor, BY_ROW: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program writes the loss and, with GRADIENT, d/db. With BY_ROW each program adds up its rows' sums."""
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, sum_of_parts(totals_ptr, n_totals) * loss_factor)
        if GRADIENT:
            tl.store(d_bias_ptr, sum_of_parts(slopes_ptr, n_totals) * factor)
    if BY_ROW:
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK,), tl.float32)
        plane = planes_ptr + offs
        for _ in range(0, n_planes):
            sums += tl.load(plane, mask=offs < n, other=0.0)
            plane += stride_plane
        tl.store(sums_ptr + offs, sums, mask=offs < n)


@triton.jit(do_not_specialize=SIZES)
def _form_pairs_kernel(
    rows_x_ptr, rows_lo_ptr, rows_r_ptr, rows_ids_ptr, rows_low_ptr, rows_high_ptr,
    cols_x_ptr, cols_lo_ptr, cols_r_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    rows_w_ptr, cols_w_ptr, g_ptr, parts_ptr, n_rows, n_cols, DP, row_0, col_0, row_1, col_1, mirrored,
    stride_g, inv_tau, bias,
    WEIGHTED: tl.constexpr, POSITIVES: tl.constexpr, ONE_SIDE: tl.constexpr,
    ON_DEVICE: tl.constexpr, BIAS_ON_DEVICE: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr, PADDED_ROWS: tl.constexpr,
):  # fmt: skip
    """Write a tile of G for one or both squares (panels.py), with each column multiplied by its r.

    Also write the tile's part of radial, of the sums of softplus and of the sums of G.
    """
    k, b = load_inverse_temperature(inv_tau, ON_DEVICE), tl.load(bias) if BIAS_ON_DEVICE else bias
    down, across = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    second = down >= stride_g
    row, col = tl.where(second, row_1 - stride_g, row_0) + down, tl.where(second, col_1, col_0) + across
    if (row >= tl.cdiv(n_rows, PADDED_ROWS) * PADDED_ROWS) | (col >= tl.cdiv(n_cols, PADDED_ROWS) * PADDED_ROWS):
        return
    s = similarities(
        rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP, SPLIT, TF32, UPCAST, BLOCK_M, BLOCK_N, BLOCK_D
    )
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    r_m, r_n = tl.load(rows_r_ptr + offs_m), tl.load(cols_r_ptr + offs_n)
    low, high = span(rows_low_ptr, rows_high_ptr, row, BLOCK_M, SPAN)
    col_low, col_high = span(cols_low_ptr, cols_high_ptr, col, BLOCK_N, SPAN)
    ends = (row + BLOCK_M > n_rows) | (col + BLOCK_N > n_cols)
    if ends | ((low <= col_high) & (col_low <= high)):
        values, g = softplus_of_pairs(
            s, r_m, r_n, rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, k, b,
            True, POSITIVES, ONE_SIDE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        values, g = softplus_of_pairs(
            s, r_m, r_n, rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, k, b,
            False, POSITIVES, ONE_SIDE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if WEIGHTED:
        w_m = tl.load(rows_w_ptr + offs_m, mask=offs_m < n_rows, other=0.0)
        g *= w_m[:, None] + tl.load(cols_w_ptr + offs_n, mask=offs_n < n_cols, other=0.0)[None, :]
    to_m, to_n = down + tl.arange(0, BLOCK_M), across + tl.arange(0, BLOCK_N)
    wide_m, wide_n = to_m.to(tl.int64) * stride_g, (stride_g + to_n).to(tl.int64) * stride_g
    of_rows = g * r_n[None, :]
    part_m = parts_ptr + across // BLOCK_N * 2 * SUMS * stride_g + to_m
    tl.store(part_m, tl.sum(s * of_rows, 1))
    tl.store(part_m + 2 * stride_g, tl.sum(values, 1))
    tl.store(part_m + 4 * stride_g, tl.sum(g, 1))
    tl.store(g_ptr + wide_m[:, None] + to_n[None, :], rounded(of_rows, g_ptr.dtype.element_ty, UPCAST))
    if mirrored:
        of_cols = g * r_m[:, None]
        part_n = parts_ptr + (down // BLOCK_M * 2 * SUMS + 1) * stride_g + to_n
        tl.store(part_n, tl.sum(s * of_cols, 0))
        tl.store(part_n + 2 * stride_g, tl.sum(values, 0))
        tl.store(part_n + 4 * stride_g, tl.sum(g, 0))
        of_cols = rounded(of_cols, g_ptr.dtype.element_ty, UPCAST)
        tl.store(g_ptr + wide_n[:, None] + to_m[None, :], tl.trans(of_cols))


class Pairs(NamedTuple):
    """The bias of the logits, whether pairs within a group count, and the weights of the rows' and the columns' sums.

    The weights are None if every pair has weight 1.
    """

    bias: float | Tensor
    positives: bool
    of_rows: Tensor | None = None
    of_cols: Tensor | None = None

    def swapped(self) -> Pairs:
        """Return the same pairs with rows and columns exchanged."""
        return self._replace(of_rows=self.of_cols, of_cols=self.of_rows)


class Formed(NamedTuple):
    """The rows' sums in P parts (P, rows), partial totals of these sums and of G, and the rows' `Gathered`."""

    sums: Tensor
    totals: Tensor
    slopes: Tensor
    gathered: Gathered


def form_pairs(sides: Sides, pairs: Pairs, *, gradient: bool) -> Formed:
    """Return the rows' sums and, if `gradient`, their `Gathered`."""
    if gradient and config.choose("pairs", sides.rows) is None:
        return _form_in_panels(sides, pairs)
    rows, cols, new = sides.rows, sides.cols, sides.work.empty
    tile = config.tile("pairs" if gradient else "sums", rows)
    block_d = rows.DP if gradient else tile.block_d
    blocks = triton.cdiv(rows.n, tile.block_m)
    part_cols = config.columns_of_part(config.multiprocessors(rows.x.device), blocks, cols.n, tile.block_n)
    n_parts = triton.cdiv(cols.n, part_cols)
    padded = rows.r.shape[0]
    if gradient:
        gathered = Gathered(new(n_parts, padded, rows.DP), new(n_parts, padded), new(n_parts * blocks))
    else:
        gathered = Gathered(rows.unread, rows.unread, rows.unread)
    found = Formed(new(n_parts, padded), new(n_parts * blocks), new(n_parts * blocks), gathered)
    sides.work.launch(
        _pairs_kernel, (blocks, n_parts), **rows.operands("rows"), **cols.operands("cols"),
        **_pair_arguments(sides, pairs),
        gathered_ptr=gathered.sums, radial_ptr=gathered.radial, radial_parts_ptr=gathered.radial_parts,
        sums_ptr=found.sums, totals_ptr=found.totals, slopes_ptr=found.slopes,
        DP=rows.DP, part_cols=part_cols, middle=cols.n_first,
        stride_gathered=gathered.sums.stride(0), stride_radial=gathered.radial.stride(0), stride_sums=padded,
        GRADIENT=gradient, **sides.modes(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, WHOLE_D=block_d == rows.DP,
        SPAN=SPAN, **tile.options,
    )  # fmt: skip
    return found


def _form_in_panels(sides: Sides, pairs: Pairs) -> Formed:
    """Return the rows' sums and their `Gathered`, for rows with many features."""

    def form(grid: tuple[int, int], **given: Any) -> None:
        sides.work.launch(_form_pairs_kernel, grid, **given, **_pair_arguments(sides, pairs))

    of_half = sides.rows.x.dtype == torch.float16  # true also for float32 rows, stored as two float16 parts
    dtype = torch.float32 if of_half else sides.rows.x.dtype
    found = panels.gather_formed(sides, form, dtype, tiles="form_pairs", sums=SUMS.value, in_units=of_half)
    _, totals, slopes = found.radial_parts.unbind()
    gathered = Gathered(found.sums, found.radial[:1], found.radial_parts[0])
    return Formed(found.radial[1:2], totals, slopes, gathered)


def _pair_arguments(sides: Sides, pairs: Pairs) -> dict[str, Any]:
    """Return a kernel's arguments for the weights and the logits of pairs."""
    return {
        "rows_w_ptr": sides.rows.unread if pairs.of_rows is None else pairs.of_rows,
        "cols_w_ptr": sides.cols.unread if pairs.of_cols is None else pairs.of_cols,
        "inv_tau": sides.inv_tau,
        "bias": pairs.bias,
        "WEIGHTED": pairs.of_rows is not None,
        "POSITIVES": pairs.positives,
        "ONE_SIDE": sides.one_side,
        "ON_DEVICE": sides.on_device,
        "BIAS_ON_DEVICE": isinstance(pairs.bias, Tensor),
    }


class Ends(NamedTuple):
    """The rows' sums, their total times a factor, and d/db. Results that were not requested are not written."""

    sums: Tensor
    loss: Tensor
    d_bias: Tensor


def end_pairs(
    sides: Sides, formed: Formed, *, sums: bool, gradient: bool, weight: float = 1.0, loss_weight: float = 1.0
) -> Ends:
    """Return the totals over all parts. `weight` multiplies G, and `loss_weight` multiplies the total of the sums."""
    rows, output = sides.rows, sides.work.output
    found = Ends(output(rows.n) if sums else rows.unread, output(), output())
    sides.work.launch(
        _end_kernel, (triton.cdiv(rows.n, ENDED) if sums else 1,), planes_ptr=formed.sums, totals_ptr=formed.totals,
        slopes_ptr=formed.slopes, sums_ptr=found.sums, loss_ptr=found.loss, d_bias_ptr=found.d_bias, n=rows.n,
        n_planes=formed.sums.shape[0], n_totals=formed.totals.shape[0], stride_plane=formed.sums.stride(0),
        factor=weight * (0.5 if sides.one_side else 1.0), loss_factor=loss_weight,
        BY_ROW=sums, GRADIENT=gradient, BLOCK=ENDED, num_warps=4,
    )  # fmt: skip
    return found
