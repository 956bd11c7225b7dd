// Matrix products c = a b, computed in register blocks. A register block is R rows by V vectors of c. Its sums stay in
// registers over a whole chunk of the inner dimension. Each step loads V vectors of b and R numbers of a, and adds
// their R V products to the sums.
//
// The backend `blocked` follows the same schedule with torch.mm, so it has to write every tile to memory and read it
// back. On 2 cores with AVX-512, `blocked` takes 2.3 times as long at N = 4096, D = 128, and 1.4 times at N = 2048,
// D = 2048 (benchmarks/results). The kernels in this file compute the whole loss, exponentials included, at about as
// many flops per second as torch.mm reaches for its products alone.
//
// While a block is computed, the operands of the next block are prefetched. For rows in the L3 cache, products took a
// quarter longer without prefetching: a block of 4 x 24 sums spent about as long waiting for its first cache lines as
// computing.
//
// form_products adds the terms of every element in the same order, wherever in a block the element is: chunk by chunk
// of the inner dimension, and feature by feature within a chunk. So s_ij and s_ji have the same bits, and a logit is
// the same number in the forward and in the backward. With chunks of C features, the rounding error of a sum of D terms
// with the same sign grows like C + D / C. If one sum runs over all features, as in AMX's tiles, it grows like D.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fntx::FNTX_ISA {

// The size of a register block, in rows and vectors. Its sums and the operands of one step fill the registers. Loops
// over the rows of a block are unrolled 8 times and loops over its vectors 3 times: no instruction set has larger
// blocks. The columns of one block, stored together, are called a panel.
constexpr int REGISTER_ROWS = FNTX_REGISTER_ROWS;
constexpr int REGISTER_VECTORS = 3;
template <class T> constexpr int PANEL = REGISTER_VECTORS * LANES<T>;
constexpr int64_t INNER_CHUNK = 128;  // features: a panel of this many fits in the L1 cache
constexpr int64_t PACKED_ROWS = 96;   // this many rows of a copied panel fit in the L1 cache, next to G of a block
template <int N> struct Count {
    static constexpr int value = N;
};

static_assert(ALIGNED_ROWS % REGISTER_ROWS == 0 && ALIGNED_ROWS % PANEL<float> == 0);

template <class T, int V> struct Accumulators {
    Vec<T> c[REGISTER_ROWS][V];

    FNTX_INLINE void zero(Accumulators& acc) {
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) acc.c[r][v] = Vec<T>{};
    }

    FNTX_INLINE void read(Accumulators& acc, const T* c, int64_t ldc) {
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) acc.c[r][v] = load<T>(c + r * ldc + v * LANES<T>);
    }

    // acc += c
    FNTX_INLINE void include(Accumulators& acc, const T* c, int64_t ldc) {
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) acc.c[r][v] += load<T>(c + r * ldc + v * LANES<T>);
    }

    FNTX_INLINE void write(const Accumulators& acc, T* c, int64_t ldc) {
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) store<T>(c + r * ldc + v * LANES<T>, acc.c[r][v]);
    }

    FNTX_INLINE void add(const Accumulators& acc, T* c, int64_t ldc) {
#pragma GCC unroll 8
        for (int r = 0; r < REGISTER_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) {
                T* const to = c + r * ldc + v * LANES<T>;
                store<T>(to, load(to) + acc.c[r][v]);
            }
    }

    // acc += a b over `inner` steps; step i reads a[r a_row + i a_step] and b[i b_step + ...].
    FNTX_INLINE void add_product(Accumulators& acc, const T* a, int64_t a_row, int64_t a_step, const T* b,
                                 int64_t b_step, int64_t inner) {
        for (int64_t i = 0; i < inner; ++i, a += a_step, b += b_step) {
            Vec<T> b_i[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; ++v) b_i[v] = load<T>(b + v * LANES<T>);
#pragma GCC unroll 8
            for (int r = 0; r < REGISTER_ROWS; ++r) {
                const T a_r = a[r * a_row];
#pragma GCC unroll 3
                for (int v = 0; v < V; ++v) acc.c[r][v] += a_r * b_i[v];
            }
        }
    }
};

template <class T> constexpr int64_t LINE = 64 / int64_t(sizeof(T));  // elements of a cache line

// Prefetch elements [0, n) of p for writing.
template <class T> FNTX_INLINE void prefetch_to_write(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE<T>) __builtin_prefetch(p + i, 1);
}

// Split elements [0, n) of p into `parts` shares, and prefetch share `part`.
template <class T> FNTX_INLINE void prefetch_part(const T* p, int64_t n, int64_t part, int64_t parts) {
    const int64_t lines = (n + LINE<T> - 1) / LINE<T>, each = (lines + parts - 1) / parts;
    const int64_t first = part * each, last = first + each < lines ? first + each : lines;
    for (int64_t line = first; line < last; ++line) __builtin_prefetch(p + line * LINE<T>);
}

// The rows of an operand, with a stride of `step` elements.
template <class T> struct Rows {
    const T* first;
    int64_t step;
};

// One of two ways to multiply a tile, passed as the template parameter `Way` below. The other is BfloatProducts in
// bfloat_products.h.
struct FloatProducts {
    static constexpr int64_t ROWS = REGISTER_ROWS;    // rows of a block
    static constexpr int64_t INNER = INNER_CHUNK;     // inner steps of a chunk in form_products
    static constexpr int64_t GATHERED = PACKED_ROWS;  // inner steps of a chunk in add_product
    static constexpr bool KEEPS_PRODUCTS = false;     // the forward keeps exponentials for the backward, not products

    // Accumulates the sum of G_ij s_ij for the gradient of inv_tau. A no-op here, because loss.cpp computes the same
    // number from the gathered gradient: the sum over rows i of u_i . (sum_j G_ij u_j).
    struct Radial {
        template <class Acc> void keep(const Acc&) {}
        template <class Acc> void add(const Acc&) {}
        template <class V> void add_logits(V, V) {}
        template <class T> void finish(const Tile<T>&, double) {}
    };

    // A kernel holds an instance while it multiplies. For AMX the instance configures the tile registers; here it does
    // nothing.
    struct Using {
        Using() {}  // so that compilers do not report an instance as unused
    };

    // The operands and their inner dimension.
    template <class T> static const T* rows(const Tile<T>& tile) { return tile.rows->u; }
    template <class T> static const T* panels(const Tile<T>& tile) { return tile.cols->panels; }
    template <class T> static int64_t row_length(const Tile<T>& tile) { return tile.ld; }
    template <class T> static int64_t panel_depth(const Tile<T>& tile) { return tile.D; }
    template <class T> static int64_t inner(const Tile<T>& tile) { return tile.D; }

    template <class T> FNTX_INLINE void scale(Accumulators<T, REGISTER_VECTORS>&, const Tile<T>&, int64_t, int64_t) {}

    // Return the buffer for partial sums between chunks of the inner dimension.
    template <class T> static T* sums(const Tile<T>& tile) { return tile.buffer; }

    // Multiply one chunk of the inner dimension for a block. If `begun`, add the partial sums in c. In the `last`
    // chunk, call finish(sums, row), where `row` is the first row of the sums within the block (here always 0). In
    // every other chunk, store the sums in c.
    template <class T, class Finish>
    FNTX_INLINE void multiply(T* c, int64_t ldc, bool begun, const T* a, int64_t lda, const T* b, int64_t inner,
                              bool last, Finish finish) {
        typedef Accumulators<T, REGISTER_VECTORS> Acc;
        Acc acc;
        Acc::zero(acc);
        Acc::add_product(acc, a, lda, 1, b, PANEL<T>, inner);
        if (begun) Acc::include(acc, c, ldc);
        if (last) {
            // Copy the sums: if any code indexes an array with a variable, Clang keeps the array in memory for its
            // whole life.
            Acc products = acc;
            finish(products, 0);
        } else {
            Acc::write(acc, c, ldc);
        }
    }

    // c += a b for a block of V vectors.
    template <int V, class T>
    FNTX_INLINE void add(T* c, int64_t ldc, const T* a, int64_t a_row, int64_t a_step, Rows<T> b, int64_t inner) {
        typedef Accumulators<T, V> Acc;
        Acc acc;
        Acc::zero(acc);
        Acc::add_product(acc, a, a_row, a_step, b.first, b.step, inner);
        Acc::add(acc, c, ldc);
    }

    template <class T> static void gather(const Tile<T>& tile);
};

// Compute c += a b, for c (n_rows, width), a (n_rows, inner) and b (inner, width). Element (row, i) of a is
// a[row a_row + i a_step]. Rows are computed in whole blocks, so c and a must have room for n_rows rounded up to whole
// blocks. The width must be a multiple of a vector. pack(Count<V>, packed, i, count, d) returns rows [i, i + count) of
// b, V vectors wide, starting at column d. It may copy them to the buffer `packed` first.
template <class Way, class T, class A, class Pack>
FNTX_INLINE void add_product(T* c, int64_t ldc, int64_t n_rows, int64_t width, const A* a, int64_t a_row,
                             int64_t a_step, int64_t inner, Pack pack) {
    alignas(64) A packed[Way::GATHERED * PANEL<T>];
    const auto columns = [&](auto vectors, int64_t d) __attribute__((always_inline)) {
        constexpr int V = decltype(vectors)::value;
        for (int64_t first = 0; first < inner; first += Way::GATHERED) {
            const int64_t count = inner - first < Way::GATHERED ? inner - first : Way::GATHERED;
            const Rows<A> b = pack(vectors, packed, first, count, d);
            for (int64_t row = 0; row < n_rows; row += Way::ROWS) {
                T* const to = c + row * ldc + d;
                for (int r = 0; r < Way::ROWS; ++r) prefetch_to_write(to + r * ldc, V * LANES<T>);
                Way::template add<V>(to, ldc, a + row * a_row + first * a_step, a_row, a_step, b, count);
            }
        }
    };
    int64_t d = 0;
    for (; d + PANEL<T> <= width; d += PANEL<T>) columns(Count<REGISTER_VECTORS>{}, d);
    if (width - d == 2 * LANES<T>) columns(Count<2>{}, d);
    if (width - d == LANES<T>) columns(Count<1>{}, d);
}

// Read G from the tile's buffer. Add G U_cols to the rows' `gathered` and, unless the tile is diagonal, G^T U_rows to
// the columns' `gathered`. (U_rows and U_cols are the matrices u of the tile's rows and of its columns.) The row stride
// of u is often a multiple of 512 bytes, and PACKED_ROWS rows with such a stride would evict each other from the L1
// cache. A chunk of more than ALIGNED_ROWS rows is therefore copied to consecutive memory first.
template <class T> void FloatProducts::gather(const Tile<T>& tile) {
    const PackedSide<T>&rows = *tile.rows, &cols = *tile.cols;
    const int64_t ld = tile.ld, at_rows = tile.row0 * ld, at_cols = tile.col0 * ld;
    const auto packed_from = [ld](const T* b) {
        return [b, ld](auto vectors, T* packed, int64_t first, int64_t count, int64_t d)
                   __attribute__((always_inline)) {
            constexpr int V = decltype(vectors)::value;
            if (count <= ALIGNED_ROWS) return Rows<T>{b + first * ld + d, ld};
            for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 3
                for (int v = 0; v < V; ++v)
                    store<T>(packed + (i * V + v) * LANES<T>, load(b + (first + i) * ld + d + v * LANES<T>));
            return Rows<T>{packed, V * LANES<T>};
        };
    };
    if (rows.gathered)
        add_product<FloatProducts>(rows.gathered + at_rows, ld, tile.n_rows, ld, tile.buffer, tile.edge, 1, tile.n_cols,
                                   packed_from(cols.u + at_cols));
    if (cols.gathered && !tile.diagonal)
        add_product<FloatProducts>(cols.gathered + at_cols, ld, tile.n_cols, ld, tile.buffer, 1, tile.edge, tile.n_rows,
                                   packed_from(rows.u + at_rows));
}

// Form the products of a tile's rows and columns block by block, and call finish(acc, row, column) on each register
// block while it is in registers. A long inner dimension is cut into chunks. Between chunks, a block's partial sums are
// in memory.
template <class Way, class T, class Finish> FNTX_INLINE void form_products(const Tile<T>& tile, Finish finish) {
    typedef Accumulators<T, REGISTER_VECTORS> Acc;
    const int64_t ld = Way::row_length(tile), blocks = (tile.n_rows + Way::ROWS - 1) / Way::ROWS;
    const int64_t inner = Way::inner(tile);
    for (int64_t d0 = 0; d0 < inner; d0 += Way::INNER) {
        const int64_t depth = Way::INNER < inner - d0 ? Way::INNER : inner - d0;
        for (int64_t col = 0; col < tile.n_cols; col += PANEL<T>) {
            const auto* panel = Way::panels(tile) + (tile.col0 + col) * Way::panel_depth(tile) + d0 * PANEL<T>;
            const bool last_panel = col + PANEL<T> >= tile.n_cols;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t row = block * Way::ROWS;
                const auto* u = Way::rows(tile) + (tile.row0 + row) * ld + d0;
                if (!last_panel)
                    prefetch_part(panel + PANEL<T> * Way::panel_depth(tile), depth * PANEL<T>, block, blocks);
                if (col == 0 && block + 1 < blocks)
                    for (int r = 0; r < Way::ROWS; ++r) prefetch_part(u + (Way::ROWS + r) * ld, depth, 0, 1);
                Way::multiply(Way::sums(tile) + row * tile.edge + col, tile.edge, d0 > 0, u, ld, panel, depth,
                              d0 + depth == inner, [&](Acc& acc, int64_t r) __attribute__((always_inline)) {
                    Way::scale(acc, tile, row + r, col);
                    finish(acc, row + r, col);
                });
            }
        }
    }
}

// form_products for a backward. If the forward kept the tile's products, this reads them instead of computing them
// again.
template <class Way, class T, class Finish> FNTX_INLINE void form_products_again(const Tile<T>& tile, Finish finish) {
    if constexpr (Way::KEEPS_PRODUCTS)
        if (tile.exps) return Way::recall(tile, finish);
    form_products<Way>(tile, finish);
}

}  // namespace fntx::FNTX_ISA
