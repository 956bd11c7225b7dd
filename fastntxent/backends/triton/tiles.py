"""Functions that the kernels share: operands and their products, the mask, and the weights of a tile.

Rows are packed (pack.py) as u_i = r_i x_i, with x in the dtype of the matrix units and r in float32. A similarity is
s_ij = r_i r_j (x_i . x_j). In half precision, the only rounding of x_i . x_j is in its float32 sum. Padding rows and
features are zero.

In the backward, a column of G has the factor r_j / R, where R is at least the largest r. If float32 rows are stored in
two parts and not normalised, this factor may be small, and then the two float16 parts of G hold fewer bits. A row more
than 2^14 times shorter than the longest therefore loses bits in its contribution to the gradients of other rows. At
2^20 at most 16 bits (four decimal digits) are left.

Operands (selected by the constexpr SPLIT and the dtype of x):
    float16, bfloat16   x is z times a power of two: one product
    float32             x = hi + lo in float16, with the largest element near 1: 22 bits of mantissa, as good as float32
                        (two bfloat16 parts hold 16 bits and have ten times the error); the three largest products
    float32, TF32       x in float32: one product in TF32, if PyTorch's setting allows it

Tensor cores round toward zero, so long sums in them drift. For float32 rows, an accumulator therefore sums only 64
features of a similarity, or the columns of one tile of a gradient. Ordinary additions, which round to nearest, combine
these partial sums. For this purpose operands are split into pieces of 64 features. Half-precision rows have a larger
rounding error anyway, so their operand is a single piece. The constexpr SPLIT is 0 if x has one part. If x has two
parts, SPLIT is the number of products that the chip adds before it rounds (config.py).

Triton's interpreter would multiply the bit patterns of bfloat16 numbers. So under the interpreter (UPCAST), bfloat16
operands are converted to float32 before a product.
"""

import torch
import triton
import triton.language as tl

from .. import ranges

DIRECT_LIMIT = tl.constexpr(ranges.DIRECT_LIMIT[torch.float32])
LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments that change from batch to batch. Kernels are not specialised for their values.
SIZES = [
    "n", "n_rows", "n_cols", "n_first", "n_peaks", "n_dots", "n_planes", "n_gathered", "n_radial",
    "n_rows_peaks", "n_cols_peaks", "squares", "edge", "part_cols", "middle", "stride_peaks",
    "row_0", "col_0", "row_1", "col_1", "mirrored", "n_parts_0", "n_parts_1", "n_totals", "add",
]  # fmt: skip
SUMMED = tl.constexpr(64)  # features of float32 rows that the matrix units add in one accumulator
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
FARTHEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # the largest int64
AT_ONCE = tl.constexpr(1024)  # partial results that a program reads at once


@triton.jit
def max_of_parts(values_ptr, n):
    """Return the maximum of n partial results, at least 0."""
    offs = tl.arange(0, AT_ONCE)
    found = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, n, AT_ONCE):
        found = tl.maximum(found, tl.load(values_ptr + first + offs, mask=first + offs < n, other=0.0))
    return tl.max(found)


@triton.jit
def sum_of_parts(values_ptr, n):
    """Return the sum of n partial results, in a fixed order."""
    offs = tl.arange(0, AT_ONCE)
    found = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, n, AT_ONCE):
        found += tl.load(values_ptr + first + offs, mask=first + offs < n, other=0.0)
    return tl.sum(found)


@triton.jit
def load_rows(x_ptr, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return features [d, d + BLOCK_D) of rows [first_row, first_row + ROWS) of a packed matrix."""
    first = x_ptr + tl.cast(first_row, tl.int64) * DP + d
    return tl.load(first + tl.arange(0, ROWS)[:, None] * DP + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def store_rows(out_ptr, values, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write features [d, d + BLOCK_D) of rows [first_row, first_row + ROWS) of a matrix in the packed shape."""
    offs_m = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    offs_d = d + tl.arange(0, BLOCK_D)
    tl.store(out_ptr + offs_m[:, None] * DP + offs_d[None, :], values)


@triton.jit
def load_pieces(x_ptr, lo_ptr, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """Return the rows and features of `load_rows` as pieces of an operand: pairs of x and its low part if SPLIT, else
    pairs of x and x."""
    WIDTH: tl.constexpr = SUMMED if SPLIT and BLOCK_D > SUMMED else BLOCK_D
    pieces = ()
    for i in tl.static_range(BLOCK_D // WIDTH):
        x = load_rows(x_ptr, first_row, d + i * WIDTH, DP, ROWS, WIDTH)
        pieces += ((x, load_rows(lo_ptr, first_row, d + i * WIDTH, DP, ROWS, WIDTH) if SPLIT else x),)
    return pieces


@triton.jit
def add_product(
    acc, a, a_lo, b, b_lo, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr, SAME: tl.constexpr = False
):
    """Return acc + a b. With two parts the three largest products are summed apart from acc, the largest one last.

    The matrix units add a block of SPLIT products to a sum at once, and truncate the result. On average this loses half
    a unit in the last place of the sum so far. In all, B blocks lose 0.18 (B + 1) units of 2^-23, relative to the
    total. The multiply-add that adds the sum to acc compensates for this loss, and no compiler folds this multiply-add
    into the product. With SAME the result is bitwise the same if rows and columns are exchanged.
    """
    if UPCAST and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if SPLIT:
        small = tl.fma(tl.dot(a, b_lo), 1.0, tl.dot(a_lo, b)) if SAME else tl.dot(a, b_lo, tl.dot(a_lo, b))
        LOST: tl.constexpr = (18 * (a.shape[1] // SPLIT + 1) + 50) // 100
        return tl.fma(tl.dot(a, b, small), 1.0 + LOST * 2.0**-23, acc)
    if TF32:
        return tl.dot(a, b, acc, input_precision="tf32")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def transposed(pieces):
    """Return pieces of rows as columns.

    If an operand stays the same throughout a loop, call this before the loop. Inside the loop Triton would copy the
    operand to shared memory for every tile.
    """
    columns = ()
    for i in tl.static_range(len(pieces)):
        x, lo = pieces[i]
        columns += ((tl.trans(x), tl.trans(lo)),)
    return columns


@triton.jit
def add_products(
    s, rows, columns, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr, SAME: tl.constexpr = False
):
    """Return s + rows times columns, over the features of the given pieces."""
    for i in tl.static_range(len(rows)):
        a, a_lo = rows[i]
        b, b_lo = columns[i]
        s = add_product(s, a, a_lo, b, b_lo, SPLIT, TF32, UPCAST, SAME)
    return s


@triton.jit
def add_similarities(
    s, rows, cols, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr, SAME: tl.constexpr = False
):
    """Return s + x_i . x_j, over the features of the given pieces."""
    return add_products(s, rows, transposed(cols), SPLIT, TF32, UPCAST, SAME)


@triton.jit
def rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """Return x in a narrower dtype, rounded to nearest. (The interpreter's cast to bfloat16 would truncate.)"""
    if UPCAST and (dtype == tl.bfloat16 and x.dtype == tl.float32):  # Triton 3.3 does not support chained `and`
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def power_of_two(largest):
    """Return 2^-e and 2^e for `largest` in [2^e, 2^(e + 1)), with e limited so that both are normal numbers."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def in_two_parts(x, dtype: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Return float32 numbers as an operand: two parts that add up to x if SPLIT, else x rounded to `dtype`,
    twice."""
    high = rounded(x, dtype, UPCAST)
    if SPLIT:
        return high, rounded(x - high.to(tl.float32), dtype, UPCAST)
    return high, high


@triton.jit
def in_units(g, dtype: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Return g as an operand with each row divided by a unit, and the units.

    A row's unit is the largest power of two that does not exceed the row's largest element. So a row of tiny elements
    keeps its accuracy in float16.
    """
    down, up = power_of_two(tl.max(tl.abs(g), 1))
    high, low = in_two_parts(g * down[:, None], dtype, SPLIT, UPCAST)
    return high, low, up


@triton.jit
def add_in_units(acc, a, a_lo, units, b, b_lo, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr):
    """Return acc + a b, for an operand a from `in_units`."""
    found = add_product(tl.zeros(acc.shape, tl.float32), a, a_lo, b, b_lo, SPLIT, TF32, UPCAST)
    return tl.fma(found, tl.broadcast_to(units[:, None], acc.shape), acc)


@triton.jit
def similarities(
    rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SAME: tl.constexpr = False,
):  # fmt: skip
    """Return x_i . x_j of a tile, over all features in chunks."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, DP, BLOCK_D):
        a = load_pieces(rows_x_ptr, rows_lo_ptr, row, d, DP, BLOCK_M, BLOCK_D, SPLIT)
        b = load_pieces(cols_x_ptr, cols_lo_ptr, col, d, DP, BLOCK_N, BLOCK_D, SPLIT)
        s = add_similarities(s, a, b, SPLIT, TF32, UPCAST, SAME)
    return s


@triton.jit
def span(low_ptr, high_ptr, first_row, rows, SPAN: tl.constexpr):
    """Return the smallest and the largest id of some rows."""
    offs = tl.arange(0, SPAN)
    low, high = tl.full((SPAN,), FARTHEST, tl.int64), tl.full((SPAN,), -FARTHEST, tl.int64)
    for first in range(0, rows // SPAN, SPAN):
        at, inside = first_row // SPAN + first + offs, first + offs < rows // SPAN
        low = tl.minimum(low, tl.load(low_ptr + at, mask=inside, other=FARTHEST))
        high = tl.maximum(high, tl.load(high_ptr + at, mask=inside, other=-FARTHEST))
    return tl.min(low), tl.max(high)


@triton.jit
def disjoint(rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row, rows, col, cols, SPAN: tl.constexpr):
    """Return whether the id ranges of some rows and some columns do not overlap."""
    low, high = span(rows_low_ptr, rows_high_ptr, row, rows, SPAN)
    col_low, col_high = span(cols_low_ptr, cols_high_ptr, col, cols, SPAN)
    return (high < col_low) | (col_high < low)


@triton.jit
def apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the mask of a tile: True if row and column exist and are in different groups."""
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    differ = tl.load(rows_ids_ptr + offs_m)[:, None] != tl.load(cols_ids_ptr + offs_n)[None, :]
    return differ & (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]


@triton.jit
def masked(
    values, rows_ids_ptr, rows_low_ptr, rows_high_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    row, col, n_rows, n_cols, other,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Return a tile's values, with `other` where the groups agree or the row or column does not exist.

    Ids are compared only if the id ranges of rows and columns overlap, or if the tile extends past the end of a side.
    """
    low, high = span(rows_low_ptr, rows_high_ptr, row, BLOCK_M, SPAN)
    col_low, col_high = span(cols_low_ptr, cols_high_ptr, col, BLOCK_N, SPAN)
    ends = (row + BLOCK_M > n_rows) | (col + BLOCK_N > n_cols)
    if ends | ((low <= col_high) & (col_low <= high)):
        values = tl.where(apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N), values, other)
    return values


@triton.jit
def survey_weights(w, nu, dots, peaks_ptr, dots_ptr, offs, n):
    """Write a program's largest weight and its sum of `dots`, for later kernels.

    The largest weight is used to scale all weights (weights.py). A weight whose nu is -inf does not count.
    """
    counted = (offs < n) & (nu != -float("inf"))
    tl.store(peaks_ptr + tl.program_id(0), tl.max(tl.where(counted, tl.abs(w), 0.0)))
    tl.store(dots_ptr + tl.program_id(0), tl.sum(tl.where(offs < n, dots, 0.0)))


@triton.jit
def weigh(s, r_m, a_m, nu_m, r_n, a_n, nu_n, factor_n, k, SHIFTED: tl.constexpr):
    """Return G_ij times a factor of its column, before the mask, given a tile s of x_i . x_j.

    a_n already contains the factor. In the direct regime a is w exp(-nu), and G_ij = exp(k s_ij) (a_i + a_j). In the
    shifted regime a is w, and G_ij = a_i P_ij + a_j P_ji.
    """
    if SHIFTED:
        logits = s * (r_m[:, None] * r_n[None, :]) * k  # bitwise equal to the forward's logits
        of_rows = a_m[:, None] * factor_n[None, :] * tl.exp2((logits - nu_m[:, None]) * LOG2_E)
        return of_rows + a_n[None, :] * tl.exp2((logits - nu_n[None, :]) * LOG2_E)
    exps = tl.exp2(s * r_n[None, :] * (r_m * (k * LOG2_E))[:, None])
    a_m, factor_n = tl.broadcast(a_m[:, None], factor_n[None, :])
    return exps * tl.fma(a_m, factor_n, tl.broadcast_to(a_n[None, :], a_m.shape))


@triton.jit
def load_limits(limits_ptr, offs, n, scale, shift):
    """Return the largest similarity that counts in each row's sum."""
    return tl.load(limits_ptr + offs, mask=offs < n, other=0.0) * scale + shift


@triton.jit
def within(values, similarities, limits, other):
    """Return the values whose similarities are within the limits, with `other` elsewhere. A NaN counts as within."""
    return tl.where(similarities > limits, other, values)


@triton.jit
def weigh_within(s, r_m, a_m, nu_m, limits_m, r_n, a_n, nu_n, limits_n, factor_n, k):
    """Return G_ij like `weigh` in the shifted regime, keeping only the terms whose s_ij is within their row's limit."""
    similarities = s * (r_m[:, None] * r_n[None, :])  # like the logits, bitwise equal to the forward's
    logits = similarities * k
    of_rows = within(logits, similarities, limits_m[:, None], -float("inf"))
    of_cols = within(logits, similarities, limits_n[None, :], -float("inf"))
    of_rows = a_m[:, None] * factor_n[None, :] * tl.exp2((of_rows - nu_m[:, None]) * LOG2_E)
    return of_rows + a_n[None, :] * tl.exp2((of_cols - nu_n[None, :]) * LOG2_E)


@triton.jit
def meeting(cols_low_ptr, cols_high_ptr, low, high, first, last, BLOCK_N: tl.constexpr, SPAN: tl.constexpr):
    """Return the range of columns from the first to the last tile in [first, last) whose ids may lie in [low, high].

    If there is no such tile, the range is empty and begins at `first`.
    """
    offs = tl.arange(0, AT_ONCE)
    begins, ends = tl.full((AT_ONCE,), last, tl.int32), tl.full((AT_ONCE,), first, tl.int32)
    for start in range(first, last, AT_ONCE * SPAN):
        col = start + offs * SPAN
        col_low = tl.load(cols_low_ptr + col // SPAN, mask=col < last, other=0)
        col_high = tl.load(cols_high_ptr + col // SPAN, mask=col < last, other=0)
        meets = (col < last) & (low <= col_high) & (col_low <= high)
        begins = tl.minimum(begins, tl.where(meets, col, last))
        ends = tl.maximum(ends, tl.where(meets, col + SPAN, first))
    begin, end = tl.min(begins), tl.max(ends)
    begin, end = begin // BLOCK_N * BLOCK_N, tl.cdiv(end, BLOCK_N) * BLOCK_N
    return tl.where(begin < end, begin, first), end


@triton.jit
def columns_that_meet(
    rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row, first, last, middle,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Return bounds that separate the tiles of the columns [first, last) that may contain an id of the rows.

    With two views there are two ranges of such tiles, one on either side of the middle. A partial last tile is a third
    range.
    """
    full = last // BLOCK_N * BLOCK_N
    middle = tl.minimum(tl.maximum(middle // BLOCK_N * BLOCK_N, first), full)
    low, high = span(rows_low_ptr, rows_high_ptr, row, BLOCK_M, SPAN)
    begin_0, end_0 = meeting(cols_low_ptr, cols_high_ptr, low, high, first, middle, BLOCK_N, SPAN)
    begin_1, end_1 = meeting(cols_low_ptr, cols_high_ptr, low, high, middle, full, BLOCK_N, SPAN)
    return first, begin_0, end_0, begin_1, end_1, full, last


@triton.jit
def tiles_of(columns, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the order (for `column_of_tile`) and the number of the tiles that need a mask (if MASKED), or of all other
    tiles."""
    first, begin_0, end_0, begin_1, end_1, full, last = columns
    met = (end_0 - begin_0 + end_1 - begin_1) // BLOCK_N
    if MASKED:
        return (begin_0, end_0, begin_1 - end_0, end_1, full - end_1), met + tl.cdiv(last - full, BLOCK_N)
    return (first, begin_0, end_0 - begin_0, begin_1, end_1 - begin_1), (full - first) // BLOCK_N - met


@triton.jit
def column_of_tile(tile, order, BLOCK_N: tl.constexpr):
    """Return the first column of a tile. Tiles are consecutive except for two gaps, which are skipped."""
    first, gap_0, skip_0, gap_1, skip_1 = order
    col = first + tile * BLOCK_N
    col += tl.where(col >= gap_0, skip_0, 0)
    col += tl.where(col >= gap_1, skip_1, 0)
    return tl.multiple_of(col, BLOCK_N)


@triton.jit
def add_tile(gathered, g, g_lo, cols, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr):
    """Return gathered + G x for a tile, piece by piece."""
    sums = ()
    for i in tl.static_range(len(cols)):
        x, lo = cols[i]
        sums += (add_product(gathered[i], g, g_lo, x, lo, SPLIT, TF32, UPCAST),)
    return sums


@triton.jit
def add_dots(
    dots, sums, x_ptr, lo_ptr, row, part_cols, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr
):
    """Return dots + x_i . sums_i. x_i is loaded again so that the compiler need not hold it in registers until here."""
    tl.static_assert(SPLIT != 0)  # otherwise x would count twice
    again = row + tl.minimum(part_cols, 0)  # equal to row, but the compiler cannot know that
    x_m = load_pieces(x_ptr, lo_ptr, again, 0, BLOCK_D, BLOCK_M, BLOCK_D, SPLIT)
    for i in tl.static_range(len(x_m)):
        x, lo = x_m[i]
        dots += tl.sum((x.to(tl.float32) + lo.to(tl.float32)) * sums[i], 1)
    return dots


INTERPRETED = not isinstance(load_rows, triton.JITFunction)
# An option of every launch. If the compiler contracted a * b - c into one instruction, which rounds only once, the
# backward's logits would differ from the forward's by 3e-5 at a temperature of 0.001. Where kernels need a
# multiply-add, they call tl.fma.
NO_CONTRACTION = {"enable_fp_fusion": False}
