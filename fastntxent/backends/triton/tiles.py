"""What the kernels share: operands and their products, the mask, weights of a tile.

Rows are packed (pack.py) as u_i = r_i x_i: x in the type the matrix units take, r a float32. A similarity is then
s_ij = r_i r_j (x_i . x_j), of a product that is exact but for its float32 sum. Padding rows and features are zero. In
the backward a column of G counts r_j over the largest r: of rows that are not normalised, those more than 2^14 times
shorter than the longest lose digits of their part in the others' gradients, at 2^20 all but four.

Operands (the constexpr SPLIT and the dtype of x):
    float16, bfloat16   x is z itself, up to a power of two: one product
    float32             x = hi + lo in float16, whose largest element is near 1: 22 bits of mantissa, as good as float32
                        (two parts of bfloat16 hold 16, and ten times the error), and the three products that matter
    float32, TF32       x in float32, one product in TF32: where PyTorch's setting allows it

Tensor cores round toward zero, and a long sum in them drifts. For float32 rows they add 64 features of a similarity, or
the columns of one tile of a gradient, in a fresh accumulator; ordinary additions, which round to nearest, go on from
there. So operands are held in pieces of 64 features. Half precision, whose own error is larger, has a single piece. The
constexpr SPLIT is 0 where x has one part; where it has two, it is how many products the chip adds before it rounds
(config.py).

The interpreter multiplies the bit patterns of bfloat16: there (UPCAST) they are widened before a product.
"""

import torch
import triton
import triton.language as tl

from .. import ranges

DIRECT_LIMIT = tl.constexpr(ranges.DIRECT_LIMIT[torch.float32])
LOG2_E = tl.constexpr(1.4426950408889634)
# Numbers that change from batch to batch: a kernel compiled for one value serves every other.
SIZES = [
    "n", "n_rows", "n_cols", "n_first", "n_peaks", "n_dots", "n_planes", "n_gathered", "n_radial",
    "n_rows_peaks", "n_cols_peaks", "squares", "edge", "part_cols", "middle", "stride_peaks",
    "row_0", "col_0", "row_1", "col_1", "mirrored", "n_parts_0", "n_parts_1", "n_totals", "add",
]  # fmt: skip
SUMMED = tl.constexpr(64)  # features of float32 rows that the matrix units add in one accumulator
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
FARTHEST = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # no id is farther from zero
AT_ONCE = tl.constexpr(1024)  # numbers of other programs that a program reads at once


@triton.jit
def max_of_parts(values_ptr, n):
    """The largest of what programs found, at least 0."""
    offs = tl.arange(0, AT_ONCE)
    found = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, n, AT_ONCE):
        found = tl.maximum(found, tl.load(values_ptr + first + offs, mask=first + offs < n, other=0.0))
    return tl.max(found)


@triton.jit
def sum_of_parts(values_ptr, n):
    """The sum of what programs found, always in the same order."""
    offs = tl.arange(0, AT_ONCE)
    found = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, n, AT_ONCE):
        found += tl.load(values_ptr + first + offs, mask=first + offs < n, other=0.0)
    return tl.sum(found)


@triton.jit
def load_rows(x_ptr, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features [d, d + BLOCK_D) of rows [first_row, first_row + ROWS) of a packed matrix."""
    first = x_ptr + tl.cast(first_row, tl.int64) * DP + d
    return tl.load(first + tl.arange(0, ROWS)[:, None] * DP + tl.arange(0, BLOCK_D)[None, :])


@triton.jit
def store_rows(out_ptr, values, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same place of a matrix of that shape."""
    offs_m = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    offs_d = d + tl.arange(0, BLOCK_D)
    tl.store(out_ptr + offs_m[:, None] * DP + offs_d[None, :], values)


@triton.jit
def load_pieces(x_ptr, lo_ptr, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr):
    """The same rows and features as pieces of an operand: x and its small part."""
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
    """acc + a b. Of two parts, the three products that matter are added apart from acc, the largest last.

    Each block of products cuts half a unit in the last place off the sum so far, on average. B blocks cut off
    0.18 (B + 1) units of 2^-23 of the whole. They are put back when the sum joins acc, by a multiply-add that no
    compiler folds into the product. SAME: rows and columns exchanged have the same bits."""
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
    """Pieces of rows as columns. For an operand that stays through a loop it must be called before the loop: inside,
    Triton would copy it to shared memory for every tile."""
    columns = ()
    for i in tl.static_range(len(pieces)):
        x, lo = pieces[i]
        columns += ((tl.trans(x), tl.trans(lo)),)
    return columns


@triton.jit
def add_products(
    s, rows, columns, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr, SAME: tl.constexpr = False
):
    """s + rows times columns over the features of some pieces."""
    for i in tl.static_range(len(rows)):
        a, a_lo = rows[i]
        b, b_lo = columns[i]
        s = add_product(s, a, a_lo, b, b_lo, SPLIT, TF32, UPCAST, SAME)
    return s


@triton.jit
def add_similarities(
    s, rows, cols, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr, SAME: tl.constexpr = False
):
    """s + x_i . x_j over the features of some pieces."""
    return add_products(s, rows, transposed(cols), SPLIT, TF32, UPCAST, SAME)


@triton.jit
def rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """x in a narrower type, to nearest: the interpreter would truncate to bfloat16."""
    if UPCAST and (dtype == tl.bfloat16 and x.dtype == tl.float32):  # Triton 3.3 has no chains of `and`
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def power_of_two(largest):
    """1 / 2^e for largest in [2^e, 2^(e + 1)), kept normal, and 2^e."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def in_two_parts(x, dtype: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Float32 numbers as an operand: x, or if SPLIT the sum of two parts."""
    high = rounded(x, dtype, UPCAST)
    if SPLIT:
        return high, rounded(x - high.to(tl.float32), dtype, UPCAST)
    return high, high


@triton.jit
def in_units(g, dtype: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """An operand whose rows may all be small: each in units of a power of two from its largest; and the units."""
    down, up = power_of_two(tl.max(tl.abs(g), 1))
    high, low = in_two_parts(g * down[:, None], dtype, SPLIT, UPCAST)
    return high, low, up


@triton.jit
def add_in_units(acc, a, a_lo, units, b, b_lo, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b of such an operand."""
    found = add_product(tl.zeros(acc.shape, tl.float32), a, a_lo, b, b_lo, SPLIT, TF32, UPCAST)
    return tl.fma(found, tl.broadcast_to(units[:, None], acc.shape), acc)


@triton.jit
def similarities(
    rows_x_ptr, rows_lo_ptr, cols_x_ptr, cols_lo_ptr, row, col, DP,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SAME: tl.constexpr = False,
):  # fmt: skip
    """x_i . x_j of a tile, over all features in chunks."""
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, DP, BLOCK_D):
        a = load_pieces(rows_x_ptr, rows_lo_ptr, row, d, DP, BLOCK_M, BLOCK_D, SPLIT)
        b = load_pieces(cols_x_ptr, cols_lo_ptr, col, d, DP, BLOCK_N, BLOCK_D, SPLIT)
        s = add_similarities(s, a, b, SPLIT, TF32, UPCAST, SAME)
    return s


@triton.jit
def span(low_ptr, high_ptr, first_row, rows, SPAN: tl.constexpr):
    """The smallest and the largest id of some rows."""
    offs = tl.arange(0, SPAN)
    low, high = tl.full((SPAN,), FARTHEST, tl.int64), tl.full((SPAN,), -FARTHEST, tl.int64)
    for first in range(0, rows // SPAN, SPAN):
        at, inside = first_row // SPAN + first + offs, first + offs < rows // SPAN
        low = tl.minimum(low, tl.load(low_ptr + at, mask=inside, other=FARTHEST))
        high = tl.maximum(high, tl.load(high_ptr + at, mask=inside, other=-FARTHEST))
    return tl.min(low), tl.max(high)


@triton.jit
def disjoint(rows_low_ptr, rows_high_ptr, cols_low_ptr, cols_high_ptr, row, rows, col, cols, SPAN: tl.constexpr):
    """Whether the ids of some rows all lie on one side of those of some columns."""
    low, high = span(rows_low_ptr, rows_high_ptr, row, rows, SPAN)
    col_low, col_high = span(cols_low_ptr, cols_high_ptr, col, cols, SPAN)
    return (high < col_low) | (col_high < low)


@triton.jit
def apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where row and column exist and are of different groups."""
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    differ = tl.load(rows_ids_ptr + offs_m)[:, None] != tl.load(cols_ids_ptr + offs_n)[None, :]
    return differ & (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]


@triton.jit
def masked(
    values, rows_ids_ptr, rows_low_ptr, rows_high_ptr, cols_ids_ptr, cols_low_ptr, cols_high_ptr,
    row, col, n_rows, n_cols, other,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A tile's values, `other` where the groups agree or there is no row or column. Ids are compared in the tiles alone
    where their spans meet, or a side ends."""
    low, high = span(rows_low_ptr, rows_high_ptr, row, BLOCK_M, SPAN)
    col_low, col_high = span(cols_low_ptr, cols_high_ptr, col, BLOCK_N, SPAN)
    ends = (row + BLOCK_M > n_rows) | (col + BLOCK_N > n_cols)
    if ends | ((low <= col_high) & (col_low <= high)):
        values = tl.where(apart(rows_ids_ptr, cols_ids_ptr, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N), values, other)
    return values


@triton.jit
def survey_weights(w, nu, dots, peaks_ptr, dots_ptr, offs, n):
    """A program's largest weight and its sum of products, for those who come after. Weights of any magnitude (a loss
    scaler's 2^16, a mean's 1e-6) enter the tiles with the largest at 1; one behind a nu of -inf does not count."""
    counted = (offs < n) & (nu != -float("inf"))
    tl.store(peaks_ptr + tl.program_id(0), tl.max(tl.where(counted, tl.abs(w), 0.0)))
    tl.store(dots_ptr + tl.program_id(0), tl.sum(tl.where(offs < n, dots, 0.0)))


@triton.jit
def weigh(s, r_m, a_m, nu_m, r_n, a_n, nu_n, factor_n, k, SHIFTED: tl.constexpr):
    """G_ij of a tile of similarities x_i . x_j times a factor of its column, before the mask; a_n has the factor in it.
    Direct, a is w exp(-nu): G_ij = exp(k s_ij) (a_i + a_j). Shifted, it is w: G_ij = a_i P_ij + a_j P_ji."""
    if SHIFTED:
        logits = s * (r_m[:, None] * r_n[None, :]) * k  # the forward's, to the last bit
        of_rows = a_m[:, None] * factor_n[None, :] * tl.exp2((logits - nu_m[:, None]) * LOG2_E)
        return of_rows + a_n[None, :] * tl.exp2((logits - nu_n[None, :]) * LOG2_E)
    exps = tl.exp2(s * r_n[None, :] * (r_m * (k * LOG2_E))[:, None])
    a_m, factor_n = tl.broadcast(a_m[:, None], factor_n[None, :])
    return exps * tl.fma(a_m, factor_n, tl.broadcast_to(a_n[None, :], a_m.shape))


@triton.jit
def load_limits(limits_ptr, offs, n, scale, shift):
    """The largest similarity that each row's sum takes."""
    return tl.load(limits_ptr + offs, mask=offs < n, other=0.0) * scale + shift


@triton.jit
def within(values, similarities, limits, other):
    """The values of similarities up to a limit. A NaN is not above it."""
    return tl.where(similarities > limits, other, values)


@triton.jit
def weigh_within(s, r_m, a_m, nu_m, limits_m, r_n, a_n, nu_n, limits_n, factor_n, k):
    """G_ij as `weigh` has it shifted, each of its terms where s_ij is within that row's limit."""
    similarities = s * (r_m[:, None] * r_n[None, :])  # the forward's, to the last bit, and so are the logits
    logits = similarities * k
    of_rows = within(logits, similarities, limits_m[:, None], -float("inf"))
    of_cols = within(logits, similarities, limits_n[None, :], -float("inf"))
    of_rows = a_m[:, None] * factor_n[None, :] * tl.exp2((of_rows - nu_m[:, None]) * LOG2_E)
    return of_rows + a_n[None, :] * tl.exp2((of_cols - nu_n[None, :]) * LOG2_E)


@triton.jit
def meeting(cols_low_ptr, cols_high_ptr, low, high, first, last, BLOCK_N: tl.constexpr, SPAN: tl.constexpr):
    """The range of columns from the first to the last tile in [first, last) whose ids meet [low, high]: empty, at
    `first`, where none does."""
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
    """Columns [first, last) by whether their tiles may hold an id of the rows. Two views have two ranges that may, one
    on either side of the middle; a last tile that is not full is the third."""
    full = last // BLOCK_N * BLOCK_N
    middle = tl.minimum(tl.maximum(middle // BLOCK_N * BLOCK_N, first), full)
    low, high = span(rows_low_ptr, rows_high_ptr, row, BLOCK_M, SPAN)
    begin_0, end_0 = meeting(cols_low_ptr, cols_high_ptr, low, high, first, middle, BLOCK_N, SPAN)
    begin_1, end_1 = meeting(cols_low_ptr, cols_high_ptr, low, high, middle, full, BLOCK_N, SPAN)
    return first, begin_0, end_0, begin_1, end_1, full, last


@triton.jit
def tiles_of(columns, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tiles of `columns_that_meet` that need a mask, or the others, for `column_of_tile`, and their number."""
    first, begin_0, end_0, begin_1, end_1, full, last = columns
    met = (end_0 - begin_0 + end_1 - begin_1) // BLOCK_N
    if MASKED:
        return (begin_0, end_0, begin_1 - end_0, end_1, full - end_1), met + tl.cdiv(last - full, BLOCK_N)
    return (first, begin_0, end_0 - begin_0, begin_1, end_1 - begin_1), (full - first) // BLOCK_N - met


@triton.jit
def column_of_tile(tile, order, BLOCK_N: tl.constexpr):
    """Where a tile begins: columns follow each other from the first on, but for those that are skipped at two gaps."""
    first, gap_0, skip_0, gap_1, skip_1 = order
    col = first + tile * BLOCK_N
    col += tl.where(col >= gap_0, skip_0, 0)
    col += tl.where(col >= gap_1, skip_1, 0)
    return tl.multiple_of(col, BLOCK_N)


@triton.jit
def add_tile(gathered, g, g_lo, cols, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr):
    """gathered + G x of a tile, piece by piece."""
    sums = ()
    for i in tl.static_range(len(cols)):
        x, lo = cols[i]
        sums += (add_product(gathered[i], g, g_lo, x, lo, SPLIT, TF32, UPCAST),)
    return sums


@triton.jit
def add_dots(
    dots, sums, x_ptr, lo_ptr, row, part_cols, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr
):
    """dots + x_i . sums_i of rows that are read again: the compiler must not hold x in registers till here."""
    again = row + tl.minimum(part_cols, 0)
    x_m = load_pieces(x_ptr, lo_ptr, again, 0, BLOCK_D, BLOCK_M, BLOCK_D, SPLIT)
    for i in tl.static_range(len(x_m)):
        x, lo = x_m[i]
        dots += tl.sum((x.to(tl.float32) + lo.to(tl.float32)) * sums[i], 1)
    return dots


INTERPRETED = not isinstance(load_rows, triton.JITFunction)
# What every launch is told. A compiler that contracts a * b - c into one rounding gives the backward other logits than
# the forward summed, by 3e-5 at a temperature of 0.001: where a multiply-add is wanted, it is written.
NO_CONTRACTION = {"enable_fp_fusion": False}
