// The functions of one instruction set (kernels.h). setup.py compiles this file once for each set, with the compiler
// flags of the set.
#include "kernels.h"

#include <math.h>
#include <string.h>

#include "products.h"
#include "vec.h"
#ifdef FNTX_BFLOAT
#include "bfloat_check.h"
#include "bfloat_products.h"
#endif

namespace fntx::FNTX_ISA {
namespace {

#ifdef FNTX_BFLOAT
using Products = BfloatProducts;
#else
using Products = FloatProducts;
#endif

// --- input -----------------------------------------------------------------------------------------------------------

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

FNTX_INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

FNTX_INLINE float widen(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }

FNTX_INLINE float widen(Float16 x) {
    // The biases of the two formats' exponents differ by 112. Multiplying by 2^112 also converts subnormal numbers.
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;  // infinity, NaN
    uint32_t bits;
    const float value = bits_to_float(magnitude) * 0x1p112f;
    memcpy(&bits, &value, sizeof bits);
    return bits_to_float((special ? special | magnitude : bits) | sign);
}

FNTX_INLINE float widen(float x) { return x; }
FNTX_INLINE double widen(double x) { return x; }

// Return the squared length of a row, in double precision, so that it neither overflows nor underflows for a row of
// floats.
template <class T> FNTX_INLINE double squared_length(const T* u, int64_t ld) {
    double sums[LANES<T>] = {}, sum = 0;
    for (int64_t d = 0; d < ld; d += LANES<T>)
        for (int lane = 0; lane < LANES<T>; ++lane) sums[lane] += double(u[d + lane]) * double(u[d + lane]);
    for (double part : sums) sum += part;
    return sum;
}

// Transpose PANEL rows, so that panel[d PANEL + row] = u[row ld + d], in blocks of 4 x 4 elements where they fit.
template <class T> void pack_panel(T* panel, const T* u, int64_t D, int64_t ld) {
    typedef T Four __attribute__((vector_size(4 * sizeof(T))));
    typedef T UnalignedFour __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    const auto at = [](auto* p) { return reinterpret_cast<UnalignedFour*>(const_cast<T*>(p)); };
    static_assert(PANEL<T> % 2 == 0);
    constexpr int WHOLE = PANEL<T> / 4 * 4;
    int64_t d = 0;
    for (; d + 4 <= D; d += 4)
        for (int row = 0; row < WHOLE; row += 4) {
            const T* from = u + row * ld + d;
            const Four a = *at(from), b = *at(from + ld), c = *at(from + 2 * ld), e = *at(from + 3 * ld);
            const Four ab_low = {a[0], b[0], a[1], b[1]}, ab_high = {a[2], b[2], a[3], b[3]};
            const Four ce_low = {c[0], e[0], c[1], e[1]}, ce_high = {c[2], e[2], c[3], e[3]};
            T* to = panel + d * PANEL<T> + row;
            *at(to) = Four{ab_low[0], ab_low[1], ce_low[0], ce_low[1]};
            *at(to + PANEL<T>) = Four{ab_low[2], ab_low[3], ce_low[2], ce_low[3]};
            *at(to + 2 * PANEL<T>) = Four{ab_high[0], ab_high[1], ce_high[0], ce_high[1]};
            *at(to + 3 * PANEL<T>) = Four{ab_high[2], ab_high[3], ce_high[2], ce_high[3]};
        }
    for (int64_t k = 0; k < D; ++k)
        for (int row = k < d ? WHOLE : 0; row < PANEL<T>; ++row) panel[k * PANEL<T> + row] = u[row * ld + k];
}

template <class T, class In>
void load_row(T* u, const In* z, int64_t stride, int64_t D, int64_t ld) {
    if (stride == 1)
        for (int64_t d = 0; d < D; ++d) u[d] = widen(z[d]);
    else
        for (int64_t d = 0; d < D; ++d) u[d] = widen(z[d * stride]);
    for (int64_t d = D; d < ld; ++d) u[d] = 0;
}

void load_row_of(float* u, const fntx_matrix& z, int dtype, int64_t row, int64_t D, int64_t ld) {
    const int64_t offset = row * z.stride_row;
    if (dtype == FNTX_FLOAT16)
        load_row(u, static_cast<const Float16*>(z.data) + offset, z.stride_col, D, ld);
    else if (dtype == FNTX_BFLOAT16)
        load_row(u, static_cast<const BFloat16*>(z.data) + offset, z.stride_col, D, ld);
    else
        load_row(u, static_cast<const float*>(z.data) + offset, z.stride_col, D, ld);
}

[[maybe_unused]] void load_row_of(double* u, const fntx_matrix& z, int, int64_t row, int64_t D, int64_t ld) {
    load_row(u, static_cast<const double*>(z.data) + row * z.stride_row, z.stride_col, D, ld);
}

template <class T>
double load_rows(const PackedSide<T>& side, const fntx_matrix* z, int dtype, int64_t D, int64_t ld, bool normalize,
                 T eps, int64_t first, int64_t last) {
    double largest = 0;
    for (int64_t row = first; row < last; ++row) {
        T* u = side.u + row * ld;
        if (row >= side.n) {
            memset(u, 0, size_t(ld) * sizeof(T));
#ifdef FNTX_BFLOAT
            pack_bfloats(side, row, ld, 0, 1, normalize);
#endif
            continue;
        }
        const int64_t from = side.order ? side.order[row] : row;
        const bool second = from >= z[0].n;
        load_row_of(u, z[second], dtype, second ? from - z[0].n : from, D, ld);
        const double square = squared_length(u, ld);
        side.norm[row] = T(sqrt(square));
        const T length = normalize ? side.norm[row] > eps ? side.norm[row] : eps : T(1);
#ifdef FNTX_BFLOAT
        pack_bfloats(side, row, ld, sqrt(square), length, normalize);
#endif
        if (normalize)
            for (int64_t d = 0; d < D; ++d) u[d] /= length;
        if (largest == largest && !(square <= largest)) largest = square;  // a NaN stays
    }
#ifdef FNTX_BFLOAT
    const int64_t n_words = words_of(D), word_ld = word_row_length(ld);
    for (int64_t row = first; row < last && side.bfloat_panels; row += PANEL<T>)
        transpose_words<PANEL<T>>(side.bfloat_panels + row * n_words, PANEL<T>, side.bfloats + row * word_ld, word_ld,
                                  n_words);
#else
    if (side.panels)
        for (int64_t row = first; row < last; row += PANEL<T>)
            pack_panel(side.panels + row * D, side.u + row * ld, D, ld);
#endif
    return largest;
}

// --- tiles -----------------------------------------------------------------------------------------------------------

template <class T> using Acc = Accumulators<T, REGISTER_VECTORS>;

// Return a mask: all ones in the lanes whose column exists.
template <class T> FNTX_INLINE Bits<T> exists(const Tile<T>& tile, int64_t col) {
    Bits<T> ids;
    memcpy(&ids, tile.cols->ids + tile.col0 + col, sizeof ids);
    return ids >= 0;
}

// Return a mask: all ones in the lanes whose column exists and belongs to a different group than the row.
template <class T> FNTX_INLINE Bits<T> apart(const Tile<T>& tile, int64_t row, int64_t col) {
    Bits<T> ids;
    memcpy(&ids, tile.cols->ids + tile.col0 + col, sizeof ids);
    return (ids != tile.rows->ids[tile.row0 + row]) & (ids >= 0);
}

// Return a mask: all ones in the lanes whose pair counts in a shifted tile.
template <class T> FNTX_INLINE Bits<T> counted(const Tile<T>& tile, int64_t row, int64_t col) {
    const Bits<T> is_apart = apart(tile, row, col);
    if (!tile.agreeing) return is_apart;
    Bits<T> agree = ~is_apart & exists(tile, col);
    if (tile.diagonal && row >= col && row < col + LANES<T>) agree[row - col] = 0;
    return agree;
}

// Return `values`, with 0 in the lanes where the exponential exceeds the limit (of the row or of the column). The
// values are the exponentials themselves or their weights.
template <class T> FNTX_INLINE Vec<T> within(Vec<T> values, Vec<T> exps, Vec<T> limits) {
    return exps > limits ? Vec<T>{} : values;
}

// Return logits of a shifted tile for one side's sums, with -inf in place of logits above the side's limits.
template <class T> FNTX_INLINE Vec<T> logits_within(const Tile<T>& tile, Vec<T> logits, Vec<T> limits) {
    if (!tile.limited) return logits;
    return logits > limits ? broadcast<T>(-INFINITY) : logits;
}

template <bool MASKED, class T>
FNTX_INLINE void exponentiate(Acc<T>& acc, const Tile<T>& tile, int64_t row, int64_t col) {
    const Vec<T> scale = broadcast<T>(T(LOG2_E<double> * double(tile.inv_tau)));
#pragma GCC unroll 8
    for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
        for (int v = 0; v < REGISTER_VECTORS; ++v) {
            Vec<T> e = exp2_in_range<T>(acc.c[r][v], scale);
            if (MASKED) e = apart(tile, row + r, col + v * LANES<T>) ? e : Vec<T>{};
            acc.c[r][v] = e;
        }
}

template <bool MASKED, bool LIMITED, class T> void forward_direct(const Tile<T>& tile) {
    T* row_sums = tile.sums;
    T* col_sums = tile.sums + tile.edge * LANES<T>;
    memset(tile.sums, 0, size_t(tile.edge * (LANES<T> + 1)) * sizeof(T));
    form_products<Products>(tile, [&](Acc<T>& acc, int64_t row, int64_t col) __attribute__((always_inline)) {
        exponentiate<MASKED>(acc, tile, row, col);
        if (tile.exps && !Products::KEEPS_PRODUCTS) Acc<T>::write(acc, tile.exps + row * tile.edge + col, tile.edge);
        Vec<T> of_cols[REGISTER_VECTORS] = {};
        for (int r = 0; r < REGISTER_ROWS; ++r) {
            if (row + r >= tile.n_rows) break;
            Vec<T> of_row = load(row_sums + (row + r) * LANES<T>);
            const Vec<T> row_limit = broadcast<T>(LIMITED ? tile.rows->limits[tile.row0 + row + r] : T(0));
            for (int v = 0; v < REGISTER_VECTORS; ++v) {
                const Vec<T> e = acc.c[r][v];
                of_row += LIMITED ? within<T>(e, e, row_limit) : e;
                of_cols[v] += LIMITED ? within<T>(e, e, load(tile.cols->limits + tile.col0 + col + v * LANES<T>)) : e;
            }
            store<T>(row_sums + (row + r) * LANES<T>, of_row);
        }
        for (int v = 0; v < REGISTER_VECTORS; ++v) {
            T* sums = col_sums + col + v * LANES<T>;
            store<T>(sums, load(sums) + of_cols[v]);
        }
    });
    for (int64_t row = 0; row < tile.n_rows; ++row)
        tile.rows->sums[tile.row0 + row] += sum_of_lanes<T>(load(row_sums + row * LANES<T>));
    if (!tile.diagonal)
        for (int64_t col = 0; col < tile.n_cols; ++col) tile.cols->sums[tile.col0 + col] += col_sums[col];
}

// Write the logits to the buffer; if `masked`, write -inf where a pair does not count. The forward and the backward of
// shifted tiles both compute their logits here, so they round them in the same way. This matters because the backward
// subtracts a log-sum-exp of rounded logits from a logit, and rounding moves a logit of 1e5 by up to 4e-3.
template <class T> void form_logits(const Tile<T>& tile, bool masked) {
    form_products<Products>(tile, [&](Acc<T>& acc, int64_t row, int64_t col) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < REGISTER_VECTORS; ++v) {
                Vec<T> logits = acc.c[r][v] * tile.inv_tau;
                if (masked) logits = counted(tile, row + r, col + v * LANES<T>) ? logits : broadcast<T>(-INFINITY);
                acc.c[r][v] = logits;
            }
        Acc<T>::write(acc, tile.buffer + row * tile.edge + col, tile.edge);
    });
}

template <class T> FNTX_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) { return a > b ? a : b; }

// If `candidate` is larger than the row's peak, raise the peak to `candidate` and rescale the row's sum. Return the
// number to subtract from the row's logits: the peak, or 0 if all logits so far are -inf.
template <class T> FNTX_INLINE T raise_peak(PackedSide<T>& side, int64_t row, T candidate) {
    T& peak = side.peaks[row];
    if (candidate > peak) {
        side.sums[row] *= exp(double(peak) - double(candidate));
        peak = candidate;
    }
    return peak == T(-INFINITY) ? T(0) : peak;
}

template <class T> void forward_shifted(const Tile<T>& tile) {
    form_logits(tile, tile.masked);
    const Vec<T> least = broadcast<T>(-INFINITY);
    for (int64_t row = 0; row < tile.n_rows; ++row) {
        const T* logits = tile.buffer + row * tile.edge;
        const Vec<T> limit = broadcast<T>(tile.limited ? tile.rows->limits[tile.row0 + row] : T(0));
        const auto at = [&](int64_t col) __attribute__((always_inline)) {
            return logits_within<T>(tile, load(logits + col), limit);
        };
        Vec<T> peaks = least, sums = {};
        for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) peaks = larger<T>(at(col), peaks);
        T peak = T(-INFINITY);
        for (int lane = 0; lane < LANES<T>; ++lane) peak = peaks[lane] > peak ? peaks[lane] : peak;
        const Vec<T> shift = broadcast<T>(raise_peak(*tile.rows, tile.row0 + row, peak));
        for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) sums += exp_shifted<T>(at(col), shift);
        tile.rows->sums[tile.row0 + row] += sum_of_lanes<T>(sums);
    }
    if (tile.diagonal) return;
    for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) {
        const T* logits = tile.buffer + col;
        const int64_t j = tile.col0 + col;
        const Vec<T> limits = tile.limited ? load(tile.cols->limits + j) : Vec<T>{};
        const auto at = [&](int64_t row) __attribute__((always_inline)) {
            return logits_within<T>(tile, load(logits + row * tile.edge), limits);
        };
        Vec<T> peaks = least, sums = {}, shift;
        for (int64_t row = 0; row < tile.n_rows; ++row) peaks = larger<T>(at(row), peaks);
        for (int lane = 0; lane < LANES<T>; ++lane) shift[lane] = raise_peak(*tile.cols, j + lane, peaks[lane]);
        for (int64_t row = 0; row < tile.n_rows; ++row) sums += exp_shifted<T>(at(row), shift);
        for (int lane = 0; lane < LANES<T>; ++lane) tile.cols->sums[j + lane] += sums[lane];
    }
}

template <class T> void forward(const Tile<T>& tile) {
    const Products::Using tiles;
    if (tile.shifted)
        forward_shifted(tile);
    else if (tile.limited)
        tile.masked ? forward_direct<true, true>(tile) : forward_direct<false, true>(tile);
    else
        tile.masked ? forward_direct<true, false>(tile) : forward_direct<false, false>(tile);
}

// Write a tile's G to the tile's buffer, from the products.
template <bool MASKED, bool LIMITED, class T> void weigh_products(const Tile<T>& tile) {
    Products::Radial radial;
    form_products_again<Products>(tile, [&](Acc<T>& acc, int64_t row, int64_t col) __attribute__((always_inline)) {
        radial.keep(acc);
        exponentiate<MASKED>(acc, tile, row, col);
        const T* a = tile.rows->weights + tile.row0 + row;
        const T* b = tile.cols->weights + tile.col0 + col;
#pragma GCC unroll 3
        for (int v = 0; v < REGISTER_VECTORS; ++v) {
            const Vec<T> b_v = load(b + v * LANES<T>);
            const Vec<T> col_limits = LIMITED ? load(tile.cols->limits + tile.col0 + col + v * LANES<T>) : Vec<T>{};
#pragma GCC unroll 8
            for (int r = 0; r < REGISTER_ROWS; ++r) {
                const Vec<T> e = acc.c[r][v];
                if (LIMITED) {
                    const Vec<T> row_limit = broadcast<T>(tile.rows->limits[tile.row0 + row + r]);
                    acc.c[r][v] = e * (within<T>(broadcast<T>(a[r]), e, row_limit) + within<T>(b_v, e, col_limits));
                } else {
                    acc.c[r][v] = e * (a[r] + b_v);
                }
            }
        }
        radial.add(acc);
        Acc<T>::write(acc, tile.buffer + row * tile.edge + col, tile.edge);
    });
    radial.finish(tile, 1);
}

// Write a tile's G to the tile's buffer, from the exponentials that the forward kept.
template <class T> void weigh_exponentials(const Tile<T>& tile) {
    const T* b = tile.cols->weights + tile.col0;
    for (int64_t row = 0; row < tile.n_rows; ++row) {
        const T* exps = tile.exps + row * tile.edge;
        T* g = tile.buffer + row * tile.edge;
        const T a = tile.rows->weights[tile.row0 + row];
        const Vec<T> row_limit = broadcast<T>(tile.limited ? tile.rows->limits[tile.row0 + row] : T(0));
        const T* col_limits = tile.limited ? tile.cols->limits + tile.col0 : nullptr;
        for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) {
            const Vec<T> e = load(exps + col), b_v = load(b + col);
            const Vec<T> weights =
                col_limits ? within<T>(broadcast<T>(a), e, row_limit) + within<T>(b_v, e, load(col_limits + col))
                           : a + b_v;
            store<T>(g + col, e * weights);
        }
    }
}

// Write a shifted tile's G to the tile's buffer. The row's term shifts each logit by the row's nu, and the column's
// term by the column's nu.
template <class T> void weigh_shifted(const Tile<T>& tile) {
    form_logits(tile, tile.masked);
    Products::Radial radial;
    const PackedSide<T>&rows = *tile.rows, &cols = *tile.cols;
    for (int64_t row = 0; row < tile.n_rows; ++row) {
        T* g = tile.buffer + row * tile.edge;
        const int64_t i = tile.row0 + row;
        const Vec<T> nu_i = broadcast<T>(rows.nu[i]);
        for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) {
            const int64_t j = tile.col0 + col;
            const Vec<T> logits = load(g + col);
            const Vec<T> of_row = tile.limited ? logits_within<T>(tile, logits, broadcast<T>(rows.limits[i])) : logits;
            const Vec<T> of_col = tile.limited ? logits_within<T>(tile, logits, load(cols.limits + j)) : logits;
            const Vec<T> g_v = rows.weights[i] * exp_shifted<T>(of_row, nu_i) +
                               load(cols.weights + j) * exp_shifted<T>(of_col, load(cols.nu + j));
            radial.add_logits(g_v, logits);
            store<T>(g + col, g_v);
        }
    }
    radial.finish(tile, 1 / double(tile.inv_tau));
}

template <class T> void forward_and_gather(const Tile<T>& tile) {
    Tile<T> in_buffer = tile;
    in_buffer.exps = tile.buffer;
    forward(in_buffer);
    Products::gather(in_buffer);
}

template <class T> void backward(const Tile<T>& tile) {
    const Products::Using tiles;
    if (tile.shifted)
        weigh_shifted(tile);
    else if (tile.exps && !Products::KEEPS_PRODUCTS)
        weigh_exponentials(tile);
    else if (tile.limited)
        tile.masked ? weigh_products<true, true>(tile) : weigh_products<false, true>(tile);
    else
        tile.masked ? weigh_products<true, false>(tile) : weigh_products<false, false>(tile);
    Products::gather(tile);
}

// --- pairs of positives ----------------------------------------------------------------------------------------------

// Return log(1 + exp(nu - logit)), and set `slope` to its derivative with respect to nu. Both are 0 where the pair does
// not count.
template <class T> FNTX_INLINE Vec<T> softplus_above(const Tile<T>& tile, int64_t row, int64_t col, Vec<T> nu,
                                                     Vec<T>& slope) {
    const Bits<T> counts = counted(tile, row, col);
    const Vec<T> value = softplus<T>(nu - load(tile.buffer + row * tile.edge + col), slope);
    slope = counts ? slope : Vec<T>{};
    return counts ? value : Vec<T>{};
}

template <class T> void pairs(const Tile<T>& tile) {
    const Products::Using tiles;
    form_logits(tile, false);
    const PackedSide<T>&rows = *tile.rows, &cols = *tile.cols;
    for (int64_t row = 0; row < tile.n_rows; ++row) {
        const int64_t i = tile.row0 + row;
        Vec<T> sums = {}, slopes = {}, slope;
        for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) {
            sums += softplus_above<T>(tile, row, col, broadcast<T>(rows.nu[i]), slope);
            slopes += slope;
        }
        rows.sums[i] += sum_of_lanes<T>(sums);
        rows.slopes[i] += sum_of_lanes<T>(slopes);
    }
    if (tile.diagonal) return;
    for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) {
        const int64_t j = tile.col0 + col;
        Vec<T> sums = {}, slopes = {}, slope;
        for (int64_t row = 0; row < tile.n_rows; ++row) {
            sums += softplus_above<T>(tile, row, col, load(cols.nu + j), slope);
            slopes += slope;
        }
        for (int lane = 0; lane < LANES<T>; ++lane) {
            cols.sums[j + lane] += sums[lane];
            cols.slopes[j + lane] += slopes[lane];
        }
    }
}

template <class T> void pairs_backward(const Tile<T>& tile) {
    const Products::Using tiles;
    Products::Radial radial;
    form_logits(tile, false);
    const PackedSide<T>&rows = *tile.rows, &cols = *tile.cols;
    for (int64_t row = 0; row < tile.n_rows; ++row) {
        const int64_t i = tile.row0 + row;
        for (int64_t col = 0; col < tile.n_cols; col += LANES<T>) {
            const int64_t j = tile.col0 + col;
            T* const g = tile.buffer + row * tile.edge + col;
            const Vec<T> logits = load(g);
            Vec<T> of_row, of_col;
            softplus_above<T>(tile, row, col, broadcast<T>(rows.nu[i]), of_row);
            softplus_above<T>(tile, row, col, load(cols.nu + j), of_col);
            const Vec<T> g_v = -(rows.weights[i] * of_row + load(cols.weights + j) * of_col);
            radial.add_logits(g_v, logits);
            store<T>(g, g_v);
        }
    }
    radial.finish(tile, 1 / double(tile.inv_tau));
    Products::gather(tile);
}

// --- softplus --------------------------------------------------------------------------------------------------------

// How pairs with equal ids count in a tile. NONE: there are no such pairs. LEFT_OUT: they add nothing. POSITIVES: they
// add log(1 + exp(-x)).
enum Agreeing { NONE, LEFT_OUT, POSITIVES };

template <Agreeing AGREEING, class T>
FNTX_INLINE Vec<T> softplus_of(const Tile<T>& tile, int64_t row, int64_t col, Vec<T> x, Vec<T>& slope) {
    if (AGREEING == NONE) return softplus<T>(x, slope);
    const Bits<T> counted = apart(tile, row, col), there = AGREEING == POSITIVES ? exists(tile, col) : counted;
    if (AGREEING == POSITIVES) x = counted ? x : -x;
    const Vec<T> value = softplus<T>(x, slope);
    if (AGREEING == POSITIVES) slope = counted ? slope : -slope;
    slope = there ? slope : Vec<T>{};
    return there ? value : Vec<T>{};
}

// The gradient does not depend on the rows' sums, so one pass computes values, slopes and G_ij = slope_ij (a_i + a_j),
// where a_i is the weight of row or column i.
template <Agreeing AGREEING, class T> void softplus_products(const Tile<T>& tile) {
    const int64_t by_rows = tile.edge * LANES<T>;
    T *row_sums = tile.sums, *row_slopes = row_sums + by_rows;
    T *col_sums = row_slopes + by_rows, *col_slopes = col_sums + tile.edge;
    memset(tile.sums, 0, size_t(2 * (by_rows + tile.edge)) * sizeof(T));
    Products::Radial radial;
    form_products<Products>(tile, [&](Acc<T>& acc, int64_t row, int64_t col) __attribute__((always_inline)) {
        radial.keep(acc);
        const T* a = tile.rows->weights + tile.row0 + row;
        const T* b = tile.cols->weights + tile.col0 + col;
        for (int v = 0; v < REGISTER_VECTORS; ++v) {
            const Vec<T> b_v = load(b + v * LANES<T>);
            Vec<T> of_cols = {}, slopes_of_cols = {};
            for (int r = 0; r < REGISTER_ROWS; ++r) {
                const Vec<T> x = acc.c[r][v] * tile.inv_tau + tile.bias;
                Vec<T> slope;
                const Vec<T> value = softplus_of<AGREEING>(tile, row + r, col + v * LANES<T>, x, slope);
                acc.c[r][v] = slope * (a[r] + b_v);
                if (row + r >= tile.n_rows) continue;
                const int64_t at = (row + r) * LANES<T>;
                store<T>(row_sums + at, load(row_sums + at) + value);
                store<T>(row_slopes + at, load(row_slopes + at) + slope);
                of_cols += value;
                slopes_of_cols += slope;
            }
            const int64_t at = col + v * LANES<T>;
            store<T>(col_sums + at, load(col_sums + at) + of_cols);
            store<T>(col_slopes + at, load(col_slopes + at) + slopes_of_cols);
        }
        radial.add(acc);
        Acc<T>::write(acc, tile.buffer + row * tile.edge + col, tile.edge);
    });
    radial.finish(tile, 1);
    for (int64_t row = 0; row < tile.n_rows; ++row) {
        tile.rows->sums[tile.row0 + row] += sum_of_lanes<T>(load(row_sums + row * LANES<T>));
        tile.rows->slopes[tile.row0 + row] += sum_of_lanes<T>(load(row_slopes + row * LANES<T>));
    }
    if (tile.diagonal) return;
    for (int64_t col = 0; col < tile.n_cols; ++col) {
        tile.cols->sums[tile.col0 + col] += col_sums[col];
        tile.cols->slopes[tile.col0 + col] += col_slopes[col];
    }
}

template <class T> void softplus_tile(const Tile<T>& tile) {
    const Products::Using tiles;
    if (!tile.masked)
        softplus_products<NONE>(tile);
    else if (tile.positives)
        softplus_products<POSITIVES>(tile);
    else
        softplus_products<LEFT_OUT>(tile);
    Products::gather(tile);
}

// --- rows ------------------------------------------------------------------------------------------------------------

template <class T> double dot(const T* a, const T* b, int64_t ld) {
    Vec<T> sum = {};
    for (int64_t d = 0; d < ld; d += LANES<T>) sum += load(a + d) * load(b + d);
    return sum_of_lanes<T>(sum);
}

template <class T> void add_scaled(T* a, T x, const T* b, int64_t ld) {
    for (int64_t d = 0; d < ld; d += LANES<T>) store<T>(a + d, load(a + d) + x * load(b + d));
}

template <class T> void exp2_of(const T* x, T scale, T* y, int64_t n) {
    int64_t i = 0;
    for (; i + LANES<T> <= n; i += LANES<T>) store<T>(y + i, exp2_in_range<T>(load(x + i), broadcast<T>(scale)));
    if (i == n) return;
    T rest[LANES<T>] = {};
    memcpy(rest, x + i, size_t(n - i) * sizeof(T));
    store<T>(rest, exp2_in_range<T>(load(rest), broadcast<T>(scale)));
    memcpy(y + i, rest, size_t(n - i) * sizeof(T));
}

#ifdef FNTX_BFLOAT
constexpr bool MULTIPLIES_BFLOAT = true;
#else
constexpr bool MULTIPLIES_BFLOAT = false;
#endif

template <class T>
constexpr Kernels<T> TABLE = {
    LANES<T>,          PANEL<T>,         MULTIPLIES_BFLOAT,
    load_rows<T>,      forward<T>,       MULTIPLIES_BFLOAT ? nullptr : forward_and_gather<T>,
    backward<T>,       softplus_tile<T>, pairs<T>,
    pairs_backward<T>, dot<T>,           add_scaled<T>,
    exp2_of<T>,
};

}  // namespace

#ifdef FNTX_BFLOAT
const Kernels<float>* bfloat_kernels() { return &TABLE<float>; }

bool multiplies_right() {
    const Products::Using tiles;
    const std::unique_ptr<BfloatCheck> check(new (std::nothrow) BfloatCheck);
    return check && check->right();
}
#else
const Kernels<float>* float_kernels() { return &TABLE<float>; }
const Kernels<double>* double_kernels() { return &TABLE<double>; }
#endif

}  // namespace fntx::FNTX_ISA
