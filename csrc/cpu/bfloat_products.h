// Products of bfloat16 rows with the instructions in bfloat.h, which accumulate in float.
//
// Similarities: each row z is scaled by a power of two that brings its length to [1, 2). The scaling is exact, except
// for numbers far below the row's length. The instructions flush numbers below the normal range to zero, but after the
// scaling only negligible products and sums are that small. Without normalisation, the scale is clamped to the range
// from 2^-60 to 2^60. The product of two bfloat16 numbers is exact in float, so the sums are as accurate as sums over
// widened rows. Each sum is then multiplied by a factor of its row and a factor of its column, which undo the scaling
// and normalise.
//
// Gradients: sum_j G_ij u_j = sum_j (G_ij factor_j) z_j, where z_j is the scaled row. The only additional rounding is
// that of G_ij factor_j to bfloat16, the dtype in which the gradient itself is returned. The temperature's gradient is
// returned in float, so sum G_ij s_ij is formed before G is rounded.
#pragma once

#include <math.h>

#include "bfloat.h"
#include "products.h"

namespace fntx::FNTX_ISA {

#ifdef FNTX_TILES

// A block is one tile of rows by up to three tiles of columns, and uses up to seven of the eight tile registers.
constexpr int64_t BLOCK_ROWS = TILE_ROWS, INNER_STEP = WORDS_OF_REGISTER;

// c (BLOCK_ROWS, V vectors) = a b, or c + a b if `begun`. b has V vectors per row, and the inner dimension is `inner`
// words, a multiple of INNER_STEP.
template <int V>
FNTX_INLINE void multiply_block(float* c, int64_t ldc, bool begun, const uint32_t* a, int64_t lda, const uint32_t* b,
                                int64_t inner) {
    constexpr int64_t N = LANES<float>;
    if (begun) {
        load_tile<0>(c, ldc);
        if constexpr (V > 1) load_tile<1>(c + N, ldc);
        if constexpr (V > 2) load_tile<2>(c + 2 * N, ldc);
    } else {
        zero_tile<0>();
        if constexpr (V > 1) zero_tile<1>();
        if constexpr (V > 2) zero_tile<2>();
    }
#pragma GCC unroll 1
    for (int64_t i = 0; i < inner; i += INNER_STEP, a += INNER_STEP, b += INNER_STEP * V * N) {
        load_tile<3>(a, lda);
        load_tile<4>(b, V * N);
        multiply_tiles<0, 3, 4>();
        if constexpr (V > 1) {
            load_tile<5>(b + N, V * N);
            multiply_tiles<1, 3, 5>();
        }
        if constexpr (V > 2) {
            load_tile<6>(b + 2 * N, V * N);
            multiply_tiles<2, 3, 6>();
        }
    }
    store_tile<0>(c, ldc);
    if constexpr (V > 1) store_tile<1>(c + N, ldc);
    if constexpr (V > 2) store_tile<2>(c + 2 * N, ldc);
}

#else

constexpr int64_t BLOCK_ROWS = REGISTER_ROWS, INNER_STEP = 1;

struct UsingTiles {
    UsingTiles() {}  // so that compilers do not report an instance as unused
};

template <int V>
FNTX_INLINE void multiply_block(float* c, int64_t ldc, bool begun, const uint32_t* a, int64_t lda, const uint32_t* b,
                                int64_t inner) {
    typedef Accumulators<float, V> Acc;
    Acc acc;
    Acc::zero(acc);
    for (int64_t i = 0; i < inner; ++i, ++a, b += V * LANES<float>) {
        BfloatPairs b_i[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; ++v) memcpy(&b_i[v], b + v * LANES<float>, sizeof b_i[v]);
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r) {
            const BfloatPairs a_r = a[r * lda] - BfloatPairs{};
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) acc.c[r][v] = add_products(acc.c[r][v], a_r, b_i[v]);
        }
    }
    if (begun) Acc::include(acc, c, ldc);
    Acc::write(acc, c, ldc);
}

#endif

// Transpose ROWS rows of words, so that to[d ldt + row] = from[row ldf + d] for d < D, in blocks of 4 x 4 words.
template <int ROWS> void transpose_words(uint32_t* to, int64_t ldt, const uint32_t* from, int64_t ldf, int64_t D) {
    typedef uint32_t Four __attribute__((vector_size(16)));
    typedef uint32_t UnalignedFour __attribute__((vector_size(16), aligned(4), may_alias));
    const auto load_four = [](const uint32_t* p) { return Four(*reinterpret_cast<const UnalignedFour*>(p)); };
    const auto store_four = [](uint32_t* p, Four x) { *reinterpret_cast<UnalignedFour*>(p) = x; };
    static_assert(ROWS % 4 == 0 && WORDS_OF_REGISTER % 4 == 0);  // D is a multiple of WORDS_OF_REGISTER
    for (int64_t d = 0; d < D; d += 4)
        for (int row = 0; row < ROWS; row += 4) {
            const uint32_t* p = from + row * ldf + d;
            const Four a = load_four(p), b = load_four(p + ldf), c = load_four(p + 2 * ldf), e = load_four(p + 3 * ldf);
            uint32_t* const q = to + d * ldt + row;
            for (int k = 0; k < 4; ++k) store_four(q + k * ldt, Four{a[k], b[k], c[k], e[k]});
        }
}

// Return pairs: pair i has first[i] in its low half and second[i] in its high half.
FNTX_INLINE BfloatPairs interleave(Halves first, Halves second) {
    return __builtin_convertvector(first, BfloatPairs) | __builtin_convertvector(second, BfloatPairs) << 16;
}

FNTX_INLINE Halves load_halves(const void* p) {
    Halves x;
    memcpy(&x, p, sizeof x);
    return x;
}

struct BfloatProducts {
    static constexpr int64_t ROWS = BLOCK_ROWS;
    static constexpr int64_t INNER = 128;  // words: a chunk of a panel has as many bytes as in FloatProducts
    static constexpr int64_t GATHERED = 96;
    static constexpr bool KEEPS_PRODUCTS = true;

    typedef UsingTiles Using;
    typedef Accumulators<float, REGISTER_VECTORS> Acc;

    static const uint32_t* rows(const Tile<float>& tile) { return tile.rows->bfloats; }
    static const uint32_t* panels(const Tile<float>& tile) { return tile.cols->bfloat_panels; }
    static int64_t row_length(const Tile<float>& tile) { return tile.word_ld; }
    static int64_t panel_depth(const Tile<float>& tile) { return tile.n_words; }
    static int64_t inner(const Tile<float>& tile) { return whole_steps((tile.D + 1) / 2); }
    static float* sums(const Tile<float>& tile) { return tile.exps ? tile.exps : tile.buffer; }

    static int64_t whole_steps(int64_t n) { return (n + INNER_STEP - 1) / INNER_STEP * INNER_STEP; }

    // Turn products into similarities.
    FNTX_INLINE void scale(Acc& acc, const Tile<float>& tile, int64_t row, int64_t col) {
#pragma GCC unroll 3
        for (int v = 0; v < REGISTER_VECTORS; ++v) {
            const Vec<float> of_cols = load(tile.cols->factors + tile.col0 + col + v * LANES<float>);
            // The two factors are multiplied first, so s_ij and s_ji have the same bits.
#pragma GCC unroll 8
            for (int r = 0; r < REGISTER_ROWS; ++r) acc.c[r][v] *= of_cols * tile.rows->factors[tile.row0 + row + r];
        }
    }

    template <class Finish>
    FNTX_INLINE void multiply(float* c, int64_t ldc, bool begun, const uint32_t* a, int64_t lda, const uint32_t* b,
                              int64_t inner, bool last, Finish finish) {
        multiply_block<REGISTER_VECTORS>(c, ldc, begun, a, lda, b, inner);
        if (last) finish_block(c, ldc, finish);
    }

    template <class Finish> FNTX_INLINE void finish_block(const float* c, int64_t ldc, Finish finish) {
        for (int64_t r = 0; r < ROWS; r += REGISTER_ROWS) {
            Acc acc;
            Acc::read(acc, c + r * ldc, ldc);
            finish(acc, r);
        }
    }

    // Like form_products, but read the products that the forward kept.
    template <class Finish> FNTX_INLINE void recall(const Tile<float>& tile, Finish finish) {
        for (int64_t col = 0; col < tile.n_cols; col += PANEL<float>)
            for (int64_t row = 0; row < tile.n_rows; row += ROWS)
                finish_block(tile.exps + row * tile.edge + col, tile.edge,
                             [&](Acc& acc, int64_t r) __attribute__((always_inline)) {
                    scale(acc, tile, row + r, col);
                    finish(acc, row + r, col);
                });
    }

    template <int V>
    FNTX_INLINE void add(float* c, int64_t ldc, const uint32_t* a, int64_t a_row, int64_t, Rows<uint32_t> b,
                         int64_t inner) {
        multiply_block<V>(c, ldc, true, a, a_row, b.first, inner);
    }

    // Accumulates sum G_ij s_ij (see FloatProducts::Radial).
    class Radial {
      public:
        __attribute__((always_inline)) void keep(const Acc& similarities) { similarities_ = similarities; }

        __attribute__((always_inline)) void add(const Acc& g) {
            Vec<float> sum = {};
#pragma GCC unroll 8
            for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
                for (int v = 0; v < REGISTER_VECTORS; ++v) sum += product(g.c[r][v], similarities_.c[r][v]);
            add_sum(sum);
        }

        __attribute__((always_inline)) void add_logits(Vec<float> g, Vec<float> logits) { add_sum(product(g, logits)); }

        void finish(const Tile<float>& tile, double scale) {
            double sum = 0;
            for (int lane = 0; lane < LANES<float>; ++lane) sum += lanes_[lane];
            // A diagonal tile contains every pair twice.
            *tile.radial += sum * scale * (tile.diagonal ? 0.5 : 1);
        }

      private:
        // A pair that does not count has G = 0, and its similarity may be infinite. The product would then be NaN.
        FNTX_INLINE Vec<float> product(Vec<float> g, Vec<float> s) { return g == 0 ? Vec<float>{} : g * s; }

        __attribute__((always_inline)) void add_sum(Vec<float> sum) {
            for (int lane = 0; lane < LANES<float>; ++lane) lanes_[lane] += double(sum[lane]);
        }

        Acc similarities_;
        double lanes_[LANES<float>] = {};
    };

    // See FloatProducts::gather.
    static void gather(const Tile<float>& tile) {
        const PackedSide<float>&rows = *tile.rows, &cols = *tile.cols;
        if (rows.gathered) {
            round_rows(tile);
            gather_side(tile, rows.gathered + tile.row0 * tile.ld, tile.n_rows, cols.bfloats + tile.col0 * tile.word_ld,
                        tile.n_cols);
        }
        if (cols.gathered && !tile.diagonal) {
            round_columns(tile);
            gather_side(tile, cols.gathered + tile.col0 * tile.ld, tile.n_cols, rows.bfloats + tile.row0 * tile.word_ld,
                        tile.n_rows);
        }
    }

  private:
    // Write G_ij factor_j to the tile's bfloats, with zeros after the last column.
    static void round_rows(const Tile<float>& tile) {
        const int64_t length = words_of(tile.edge), end = 2 * words_of(tile.n_cols);
        const float* factors = tile.cols->factors + tile.col0;
        for (int64_t row = 0; row < tile.n_rows; ++row)
            for (int64_t col = 0; col < end; col += LANES<float>) {
                Halves g = {};
                if (col < tile.n_cols) g = to_bfloat(columns_of(tile, row, col) * load(factors + col));
                memcpy(reinterpret_cast<uint16_t*>(tile.bfloats + row * length) + col, &g, sizeof g);
            }
    }

    // Write G_ij factor_i to the tile's bfloats, transposed.
    static void round_columns(const Tile<float>& tile) {
        const int64_t length = words_of(tile.edge), end = 2 * words_of(tile.n_rows);
        const float* factors = tile.rows->factors + tile.row0;
        const auto rounded = [&](int64_t row, int64_t col) __attribute__((always_inline)) {
            return row < tile.n_rows ? to_bfloat(columns_of(tile, row, col) * factors[row]) : Halves{};
        };
        for (int64_t row = 0; row < end; row += 2 * WORDS_OF_REGISTER)
            for (int64_t col = 0; col < tile.n_cols; col += LANES<float>) {
                alignas(64) uint32_t block[WORDS_OF_REGISTER][LANES<float>];
                for (int64_t i = 0; i < WORDS_OF_REGISTER; ++i) {
                    const BfloatPairs pairs = interleave(rounded(row + 2 * i, col), rounded(row + 2 * i + 1, col));
                    memcpy(block[i], &pairs, sizeof pairs);
                }
                uint32_t* const to = tile.bfloats + col * length + row / 2;
                transpose_words<WORDS_OF_REGISTER>(to, length, block[0], LANES<float>, LANES<float>);
            }
    }

    // Return a vector of G, with zeros after the last column.
    FNTX_INLINE Vec<float> columns_of(const Tile<float>& tile, int64_t row, int64_t col) {
        const Vec<float> g = load(tile.buffer + row * tile.edge + col);
        Bits<float> columns;
        for (int lane = 0; lane < LANES<float>; ++lane) columns[lane] = lane;
        return columns < int32_t(tile.n_cols - col) ? g : Vec<float>{};
    }

    // gathered (n, ld) += the tile's bfloats times n_inner rows of z.
    static void gather_side(const Tile<float>& tile, float* gathered, int64_t n, const uint32_t* z, int64_t n_inner) {
        const int64_t inner = whole_steps((n_inner + 1) / 2);
        add_product<BfloatProducts>(gathered, tile.ld, n, tile.ld, tile.bfloats, words_of(tile.edge), 1, inner,
                                    [&](auto vectors, uint32_t* packed, int64_t first, int64_t count, int64_t d)
                                        __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 3
                for (int v = 0; v < V; ++v) {
                    const auto row = [&](int64_t j) __attribute__((always_inline)) {
                        if (j >= n_inner) return Halves{};
                        const auto* numbers = reinterpret_cast<const uint16_t*>(z + j * tile.word_ld);
                        return load_halves(numbers + d + v * LANES<float>);
                    };
                    const BfloatPairs pairs = interleave(row(2 * (first + i)), row(2 * (first + i) + 1));
                    memcpy(packed + (i * V + v) * LANES<float>, &pairs, sizeof pairs);
                }
            return Rows<uint32_t>{packed, V * LANES<float>};
        });
    }
};

// --- input -----------------------------------------------------------------------------------------------------------

// Pack a row of u that has not been normalised yet, and store the row's factor. The caller divides u by `divisor`
// afterwards. Without normalisation the exponent is clamped, so that the product of two factors stays in range.
FNTX_INLINE void pack_bfloats(const PackedSide<float>& side, int64_t row, int64_t ld, double length, double divisor,
                              bool normalize) {
    int exponent = length > 0 && length < INFINITY ? ilogb(length) : 0;
    if (!normalize) exponent = exponent > 60 ? 60 : exponent < -60 ? -60 : exponent;
    side.factors[row] = float(ldexp(1.0, exponent) / divisor);
    const double scale = ldexp(1.0, -exponent);
    const float* u = side.u + row * ld;
    uint16_t* const halves = reinterpret_cast<uint16_t*>(side.bfloats + row * word_row_length(ld));
    const int64_t end = 2 * word_row_length(ld);
    for (int64_t d = 0; d < end; d += LANES<float>) {
        Vec<float> x = {};
        if (d < ld)
            for (int lane = 0; lane < LANES<float>; ++lane) x[lane] = float(double(u[d + lane]) * scale);
        const Halves z = to_bfloat(x);
        memcpy(halves + d, &z, sizeof z);
    }
}

}  // namespace fntx::FNTX_ISA
