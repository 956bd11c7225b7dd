"""What the kernels share: operands and their products, the mask, weights of a tile, the choice between two regimes.

Rows are packed (pack.py) as u_i = r_i x_i: x in the type the matrix units take, r a float32. A similarity is then
s_ij = r_i r_j (x_i . x_j), of a product that is exact but for its float32 sum. Padding rows and features are zero. In
the backward a column of G counts r_j over the largest r: of rows that are not normalised, those more than 2^14 times
shorter than the longest lose digits of their part in the others' gradients, at 2^20 all but four.

Operands (the constexpr SPLIT and the dtype of x):
    float16, bfloat16   x is z itself, up to a power of two: one product
    float32             x = hi + lo in float16, whose largest element is near 1: 22 bits of mantissa, as good as float32
                        (two parts of bfloat16 hold 16, and ten times the error), and the three products that matter
    float32, TF32       x in float32, one product in TF32: where PyTorch's setting allows it

The interpreter multiplies the bit patterns of bfloat16: there (UPCAST) operands are widened before a product.
"""

import triton
import triton.language as tl

# exp(k s) itself is formed while k max|s| + ln M stays below this, two thirds of float32's range of exponents;
# elsewhere logits are shifted by their largest, or by nu.
DIRECT_LIMIT = tl.constexpr(60.0)
LOG2_E = tl.constexpr(1.4426950408889634)
# Numbers that change from batch to batch: a kernel compiled for one value serves every other.
SIZES = [
    "n", "n_rows", "n_cols", "n_first", "n_peaks", "n_dots", "n_parts", "n_planes", "n_gathered", "n_radial",
    "n_rows_peaks", "n_cols_peaks", "squares", "edge", "part_cols", "first_row", "s_peaks",
]  # fmt: skip
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
AT_ONCE = tl.constexpr(1024)  # numbers of other programs that a program reads at once


@triton.jit
def largest_of(values_ptr, n):
    """The largest of what programs found, at least 0."""
    offs = tl.arange(0, AT_ONCE)
    found = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, n, AT_ONCE):
        found = tl.maximum(found, tl.load(values_ptr + first + offs, mask=first + offs < n, other=0.0))
    return tl.max(found)


@triton.jit
def sum_of(values_ptr, n):
    """The sum of what programs found, always in the same order."""
    offs = tl.arange(0, AT_ONCE)
    found = tl.zeros((AT_ONCE,), tl.float32)
    for first in range(0, n, AT_ONCE):
        found += tl.load(values_ptr + first + offs, mask=first + offs < n, other=0.0)
    return tl.sum(found)


@triton.jit
def in_direct_range(k, bounds_ptr, log_terms, BOUNDED: tl.constexpr):
    """Whether no logit leaves the range of exp; without BOUNDED rows are unit rows, else bounds holds max|s|."""
    bound = tl.load(bounds_ptr) if BOUNDED else 1.0
    return k * bound + log_terms < DIRECT_LIMIT


@triton.jit
def largest_scale(bounds_ptr, BOUNDED: tl.constexpr):
    """A bound of the columns' r: of normalised rows, whose largest x is 1 or more, it is 1."""
    return tl.load(bounds_ptr + 1) if BOUNDED else 1.0


@triton.jit
def inverse_temperature(inv_tau, ON_DEVICE: tl.constexpr):
    """k, from device memory or as it was passed."""
    return tl.load(inv_tau) if ON_DEVICE else inv_tau


@triton.jit
def load_rows(x_ptr, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features [d, d + BLOCK_D) of rows [first_row, first_row + ROWS) of a packed matrix."""
    offs_m = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    offs_d = d + tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + offs_m[:, None] * DP + offs_d[None, :])


@triton.jit
def store_rows(out_ptr, values, first_row, d, DP, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same place of a matrix of that shape."""
    offs_m = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    offs_d = d + tl.arange(0, BLOCK_D)
    tl.store(out_ptr + offs_m[:, None] * DP + offs_d[None, :], values)


@triton.jit
def add_product(acc, a, a_lo, b, b_lo, SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if SPLIT:
        if UPCAST:
            a_lo, b_lo = a_lo.to(tl.float32), b_lo.to(tl.float32)
        acc = tl.dot(a_lo, b, acc)
        acc = tl.dot(a, b_lo, acc)
    if TF32:
        return tl.dot(a, b, acc, input_precision="tf32")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """x in a narrower type, to nearest: the interpreter would truncate to bfloat16."""
    if UPCAST and (dtype == tl.bfloat16 and x.dtype == tl.float32):  # Triton 3.3 has no chains of `and`
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def in_two_parts(x, dtype: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr):
    """Float32 numbers as an operand: x, or if SPLIT the sum of two parts."""
    high = rounded(x, dtype, UPCAST)
    if SPLIT:
        return high, rounded(x - high.to(tl.float32), dtype, UPCAST)
    return high, high


@triton.jit
def similarities(
    rows_x, rows_lo, cols_x, cols_lo, row, col, DP,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, TF32: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x_i . x_j of a tile, over all features in chunks."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, DP, BLOCK_D):
        a = load_rows(rows_x, row, d, DP, BLOCK_M, BLOCK_D)
        b = load_rows(cols_x, col, d, DP, BLOCK_N, BLOCK_D)
        a_lo, b_lo = a, b
        if SPLIT:
            a_lo = load_rows(rows_lo, row, d, DP, BLOCK_M, BLOCK_D)
            b_lo = load_rows(cols_lo, col, d, DP, BLOCK_N, BLOCK_D)
        acc = add_product(acc, a, a_lo, tl.trans(b), tl.trans(b_lo), SPLIT, TF32, UPCAST)
    return acc


@triton.jit
def span(low_ptr, high_ptr, first_row, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """The smallest and the largest id of some rows."""
    offs = first_row // SPAN + tl.arange(0, ROWS // SPAN)
    return tl.min(tl.load(low_ptr + offs)), tl.max(tl.load(high_ptr + offs))


@triton.jit
def apart(rows_ids, cols_ids, row, col, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True where row and column exist and are of different groups."""
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    differ = tl.load(rows_ids + offs_m)[:, None] != tl.load(cols_ids + offs_n)[None, :]
    return differ & (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]


@triton.jit
def masked(
    values, other, rows_ids, rows_low, rows_high, n_rows, cols_ids, cols_low, cols_high, n_cols, row, col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A tile's values, `other` where the groups agree or there is no row or column. Ids are compared in the tiles alone
    where their spans meet, or a side ends."""
    low, high = span(rows_low, rows_high, row, BLOCK_M, SPAN)
    col_low, col_high = span(cols_low, cols_high, col, BLOCK_N, SPAN)
    ends = (row + BLOCK_M > n_rows) | (col + BLOCK_N > n_cols)
    if ends | ((low <= col_high) & (col_low <= high)):
        values = tl.where(apart(rows_ids, cols_ids, row, col, n_rows, n_cols, BLOCK_M, BLOCK_N), values, other)
    return values


@triton.jit
def scaled_weights(w_ptr, nu_ptr, offs, n, largest, G_SCALE: tl.constexpr, SHIFTED: tl.constexpr):
    """Weights of rows, the largest at G_SCALE, and nu: direct, a = w exp(-nu); shifted, w. A row without negatives has
    no weight, whatever came from behind its -inf, and no probabilities."""
    w = tl.load(w_ptr + offs, mask=offs < n, other=0.0)
    nu = tl.load(nu_ptr + offs, mask=offs < n, other=-float("inf"))
    empty = nu == -float("inf")
    nu = tl.where(empty, float("inf"), nu)
    w = tl.where(empty, 0.0, w / tl.maximum(largest, TINY) * G_SCALE)
    if SHIFTED:
        return w, nu
    return w * tl.exp2(-nu * LOG2_E), nu


@triton.jit
def survey_weights(w, nu, dots, offs, n, peaks_ptr, dots_ptr):
    """A program's largest weight and its sum of products, for those who come after. Weights of any magnitude (a loss
    scaler's 2^16, a mean's 1e-6) enter the tiles with the largest at 1; one behind a nu of -inf does not count."""
    counted = (offs < n) & (nu != -float("inf"))
    tl.store(peaks_ptr + tl.program_id(0), tl.max(tl.where(counted, tl.abs(w), 0.0)))
    tl.store(dots_ptr + tl.program_id(0), tl.sum(tl.where(offs < n, dots, 0.0)))


@triton.jit
def weigh(s, r_m, r_n, k, w_m, nu_m, w_n, nu_n, SHIFTED: tl.constexpr):
    """G_ij = w_i P_ij + w_j P_ji of a tile of similarities x_i . x_j, before the mask."""
    if SHIFTED:
        logits = s * (r_m[:, None] * r_n[None, :]) * k
        of_rows = w_m[:, None] * tl.exp2((logits - nu_m[:, None]) * LOG2_E)
        return of_rows + w_n[None, :] * tl.exp2((logits - nu_n[None, :]) * LOG2_E)
    exps = tl.exp2(s * r_n[None, :] * (r_m * (k * LOG2_E))[:, None])
    return exps * (w_m[:, None] + w_n[None, :])


INTERPRETED = not isinstance(load_rows, triton.JITFunction)
