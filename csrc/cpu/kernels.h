// The functions that every instruction set implements (`Kernels`), and the structures that loss.cpp passes to them.
// fastntxent.h defines k, b and nu, and docs/architecture.md defines G. s is the similarity of a row and a column, and
// U_rows and U_cols are the matrices of a tile's rows and of its columns.
#pragma once

#include <stdint.h>

#include "fastntxent.h"

namespace fntx {

// A tile's edge and the number of rows that a side allocates are multiples of this number. It is itself a multiple of
// the height and of the width of every instruction set's register block.
constexpr int64_t ALIGNED_ROWS = 48;

// The copy of bfloat16 rows packs two numbers into each 32-bit word. words_of returns the number of words that n
// numbers take, padded to whole registers.
constexpr int64_t WORDS_OF_REGISTER = 16;
constexpr int64_t words_of(int64_t n) {
    return (n + 2 * WORDS_OF_REGISTER - 1) / (2 * WORDS_OF_REGISTER) * WORDS_OF_REGISTER;
}

// Rows whose stride is a multiple of this compete for the same few lines of the L1 cache.
constexpr int64_t COMPETING_BYTES = 1024;

// Return the row stride, in words, of the bfloat16 copy of float rows whose row stride is ld.
constexpr int64_t word_row_length(int64_t ld) {
    return words_of(ld) * 4 % COMPETING_BYTES ? words_of(ld) : words_of(ld) + WORDS_OF_REGISTER;
}

// Group ids are integers as wide as T, so that comparing them gives masks for vectors of T.
template <class T> struct IdOf;
template <> struct IdOf<float> {
    typedef int32_t Type;
};
template <> struct IdOf<double> {
    typedef int64_t Type;
};
template <class T> using Id = typename IdOf<T>::Type;

// One side of the similarity matrix in the form that the kernels use. `u` and `gathered` are row-major with a row
// stride of `ld` elements, and zero beyond column D. Every array except `order` has room for n rows, with n rounded up
// to a multiple of ALIGNED_ROWS.
template <class T> struct PackedSide {
    int64_t n;             // number of rows
    const int64_t* order;  // index in z of each row; NULL: the identity
    T* u;                  // (n, ld) rows, normalised if `normalize`
    T* panels;             // (n / panel, D, panel): u transposed, `panel` rows at a time; NULL: not needed
    T* norm;               // |z|
    // The next three replace `panels` if the instruction set multiplies bfloat16 numbers:
    uint32_t* bfloats;        // (n, word_ld) words of the rows, each row scaled by a power of two
    uint32_t* bfloat_panels;  // (n / panel, n_words, panel): the words transposed, `panel` rows at a time; or NULL
    T* factors;               // u is this factor times the row in `bfloats`
    Id<T>* ids;               // group id; -1 beyond n
    double* sums;             // sum exp(k s), or sum exp(k s - peak) if shifted; softplus, pairs: sum log(1 + exp(...))
    double* slopes;           // softplus, pairs: sum of the slopes of the terms in `sums`
    T* peaks;                 // shifted: largest k s in the sum so far
    T* weights;               // weight of nu in the gradient, times exp(-nu) unless shifted or softplus; 0 beyond n
    T* nu;                    // shifted backward: log-sum-exp, +inf for an empty sum; pairs: neg_lse
    T* limits;                // limited: largest exp(k s) that counts for the row, or largest k s if shifted
    T* gathered;              // (n, ld) sum_j G_ij u_j; NULL: not wanted
};

// A tile of the similarity matrix: up to `edge` rows against up to `edge` columns.
template <class T> struct Tile {
    PackedSide<T>* rows;
    PackedSide<T>* cols;
    int64_t D, ld;
    int64_t n_words, word_ld;  // words_of(D), word_row_length(ld)
    int64_t row0, n_rows;      // multiples of ALIGNED_ROWS, except n_rows at the end of the side
    int64_t col0, n_cols;
    bool diagonal;   // rows and columns coincide: the whole tile is formed, but adds only to the rows
    bool masked;     // some ids may agree, or the last panel is incomplete
    bool shifted;    // logits are shifted before they are exponentiated
    bool limited;    // rows and columns leave out similarities above their limits
    bool agreeing;   // only pairs of different rows with equal ids count; implies masked and shifted
    bool positives;  // softplus: pairs with equal ids add log(1 + exp(-x)) instead of nothing
    T inv_tau, bias;
    int64_t edge;  // number of rows and of columns of a full tile; row stride of exps and buffer
    T* exps;       // (edge, edge) exponentials (bfloat16: products) kept from forward to backward; or NULL
    T* buffer;     // (edge, edge) scratch of the thread
    T* sums;       // (edge, lanes + 1) scratch of the thread; twice that for softplus
    // If the instruction set multiplies bfloat16 numbers:
    uint32_t* bfloats;  // (edge, words_of(edge)) scratch of the thread
    double* radial;     // += sum G_ij s_ij (G not yet rounded), by kernels that gather; for the gradient of inv_tau
};

template <class T> struct Kernels {
    int lanes;               // row strides are multiples of this
    int panel;               // columns of a register block
    bool multiplies_bfloat;  // multiplies bfloat16 rows without widening them, and accepts no other rows

    // Convert, pad, pack and (if `normalize`) normalise rows [first, last) of a side. The rows are taken from z[0]
    // followed by z[1], in the side's `order`. `first` and `last` are multiples of ALIGNED_ROWS. Return the largest
    // squared length of a row before normalisation.
    double (*load_rows)(const PackedSide<T>& side, const fntx_matrix* z, int dtype, int64_t D, int64_t ld,
                        bool normalize, T eps, int64_t first, int64_t last);

    // Add the tile's exponentials to the sums of its rows and, unless the tile is diagonal, to the sums of its columns.
    // If `exps` is not NULL, write the exponentials (bfloat16: the products) there. It is NULL for a shifted tile.
    void (*forward)(const Tile<T>& tile);

    // Run `forward`, and add E U_cols to the rows' `gathered`, where E is the matrix of exponentials exp(k s). NULL if
    // the instruction set multiplies bfloat16 numbers, because `radial` can only be summed once the weights are known.
    void (*forward_and_gather)(const Tile<T>& tile);

    // Add G U_cols to the rows' `gathered` and, unless the tile is diagonal, G^T U_rows to the columns' `gathered`.
    void (*backward)(const Tile<T>& tile);

    // Add softplus(k s + b) to `sums` and its slope to `slopes`, for rows and columns as in `forward`. Gather as in
    // `backward`.
    void (*softplus)(const Tile<T>& tile);

    // For an agreeing tile. Like `forward`, this adds to rows and, unless the tile is diagonal, to columns. It adds
    // log(1 + exp(nu_i - k s_ij)) to the `sums` of row or column i, and the slope of this term to its `slopes`.
    void (*pairs)(const Tile<T>& tile);

    // The backward of `pairs`: gather as in `backward`, with G_ij = -(a_i slope_ij + a_j slope_ji), where a_i is the
    // weight of row or column i.
    void (*pairs_backward)(const Tile<T>& tile);

    double (*dot)(const T* a, const T* b, int64_t ld);
    void (*add_scaled)(T* a, T x, const T* b, int64_t ld);  // a += x b
    void (*exp2)(const T* x, T scale, T* y, int64_t n);     // y = 2^(x scale), computed as in the tiles
};

}  // namespace fntx
