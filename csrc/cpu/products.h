// Products on register blocks. The accumulators of a block of R rows and V vectors stay in registers for the whole
// inner dimension; each step loads V vectors of b and R numbers of a.
//
// Against a library's GEMM: the same schedule on torch.mm (backend `blocked`, which has to write every tile out and
// read it back) takes 2.3 times as long at N = 4096, D = 128, and 1.4 times at N = 2048, D = 2048, on 2 cores with
// AVX-512 (benchmarks/results); these blocks do the whole loss, exponentials included, at the flops per second of
// torch.mm itself.
//
// What a block reads next is asked for while the one before it is computed. Rows that come from the third cache took a
// quarter longer without: a block of 4 x 24 sums waits for its first lines as long as it takes to use them.
//
// Every element of form_products is summed in the order of the inner dimension, whatever the block: u_i . u_j and
// u_j . u_i have the same bits, and a logit is the same number in the forward, in the backward, and from whichever side.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace fntx::FNTX_ISA {

// Rows and vectors of a register block: its sums, and what a step loads, fill the registers. Loops over them are unrolled
// by as much as there may be, 8 and 3.
constexpr int REGISTER_ROWS = FNTX_REGISTER_ROWS;
constexpr int REGISTER_VECTORS = 3;
template <class T> constexpr int PANEL = REGISTER_VECTORS * LANES<T>;
constexpr int64_t INNER_CHUNK = 128;  // features: a panel's part of so many stays in the first cache
constexpr int64_t PACKED_ROWS = 96;   // of what is gathered: a panel of so many stays there beside the G of a block
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

    // acc += a b over `inner` steps: a[r a_row + i a_step], b[i b_step + ...].
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

template <class T> constexpr int64_t LINE = 64 / int64_t(sizeof(T));  // numbers

// Ask for numbers [0, n) of p, to be written.
template <class T> FNTX_INLINE void prefetch_to_write(const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += LINE<T>) __builtin_prefetch(p + i, 1);
}

// Ask for the share of numbers [0, n) of p that falls to one of `parts`.
template <class T> FNTX_INLINE void prefetch_part(const T* p, int64_t n, int64_t part, int64_t parts) {
    const int64_t lines = (n + LINE<T> - 1) / LINE<T>, each = (lines + parts - 1) / parts;
    const int64_t first = part * each, last = first + each < lines ? first + each : lines;
    for (int64_t line = first; line < last; ++line) __builtin_prefetch(p + line * LINE<T>);
}

// c (n_rows, width) += a b with a[row a_row + i a_step], b (inner, width) of ldb elements a row; n_rows is rounded up to
// whole register blocks, width is a multiple of a vector. Rows of b lie apart, often by a multiple of 512 bytes, and then
// fall on so few lines of the first cache that PACKED_ROWS of them push each other out: hence packed.
template <class T>
FNTX_INLINE void add_product(T* c, int64_t ldc, int64_t n_rows, int64_t width, const T* a, int64_t a_row,
                             int64_t a_step, const T* b, int64_t ldb, int64_t inner) {
    alignas(64) T packed[PACKED_ROWS * PANEL<T>];
    const auto columns = [&](auto vectors, int64_t d) __attribute__((always_inline)) {
        constexpr int V = decltype(vectors)::value;
        typedef Accumulators<T, V> Acc;
        for (int64_t first = 0; first < inner; first += PACKED_ROWS) {
            const int64_t count = inner - first < PACKED_ROWS ? inner - first : PACKED_ROWS;
            for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 3
                for (int v = 0; v < V; ++v)
                    store<T>(packed + (i * V + v) * LANES<T>, load(b + (first + i) * ldb + d + v * LANES<T>));
            for (int64_t row = 0; row < n_rows; row += REGISTER_ROWS) {
                T* const to = c + row * ldc + d;
                for (int r = 0; r < REGISTER_ROWS; ++r) prefetch_to_write(to + r * ldc, V * LANES<T>);
                Acc acc;
                Acc::zero(acc);
                Acc::add_product(acc, a + row * a_row + first * a_step, a_row, a_step, packed, V * LANES<T>, count);
                Acc::add(acc, to, ldc);
            }
        }
    };
    int64_t d = 0;
    for (; d + PANEL<T> <= width; d += PANEL<T>) columns(Count<REGISTER_VECTORS>{}, d);
    if (width - d == 2 * LANES<T>) columns(Count<2>{}, d);
    if (width - d == LANES<T>) columns(Count<1>{}, d);
}

// Form the products of a tile's rows with its columns, a register block at a time, and hand each to finish(acc, row,
// column) while it is in registers. A long inner dimension is cut into chunks; partial sums
// wait in the tile's buffer.
template <class T, class Finish> FNTX_INLINE void form_products(const Tile<T>& tile, Finish finish) {
    typedef Accumulators<T, REGISTER_VECTORS> Acc;
    const int64_t ld = tile.ld, blocks = (tile.n_rows + REGISTER_ROWS - 1) / REGISTER_ROWS;
    for (int64_t d0 = 0; d0 < tile.D; d0 += INNER_CHUNK) {
        const int64_t depth = INNER_CHUNK < tile.D - d0 ? INNER_CHUNK : tile.D - d0;
        const bool last_chunk = d0 + depth == tile.D;
        for (int64_t col = 0; col < tile.n_cols; col += PANEL<T>) {
            const T* panel = tile.cols->panels + (tile.col0 + col) * tile.D + d0 * PANEL<T>;
            const bool last_panel = col + PANEL<T> >= tile.n_cols;
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t row = block * REGISTER_ROWS;
                const T* u = tile.rows->u + (tile.row0 + row) * ld + d0;
                T* partial = tile.buffer + row * tile.edge + col;
                if (!last_panel) prefetch_part(panel + PANEL<T> * tile.D, depth * PANEL<T>, block, blocks);
                if (col == 0 && block + 1 < blocks)
                    for (int r = 0; r < REGISTER_ROWS; ++r) prefetch_part(u + (REGISTER_ROWS + r) * ld, depth, 0, 1);
                Acc acc;
                if (d0 == 0)
                    Acc::zero(acc);
                else
                    Acc::read(acc, partial, tile.edge);
                Acc::add_product(acc, u, ld, 1, panel, PANEL<T>, depth);
                if (last_chunk) {
                    // A copy: Clang keeps an array in memory for its whole life if anyone reads it by a variable index.
                    Acc products = acc;
                    finish(products, row, col);
                } else {
                    Acc::write(acc, partial, tile.edge);
                }
            }
        }
    }
}

}  // namespace fntx::FNTX_ISA
