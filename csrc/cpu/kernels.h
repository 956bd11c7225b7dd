// The functions that every instruction set implements (`Kernels`), and the structures that loss.cpp passes to them.
#pragma once

#include <stdint.h>

#include "fastntxent.h"

namespace fntx {

// The edge of a tile and the rows that a side allocates are multiples of this. The rows and columns of every
// instruction set's register block divide it.
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

// One side of the similarity matrix in the form that the kernels use. Matrices are row-major with a row stride of `ld`
// elements, and zero beyond column D. Every array has room for n rounded up to a multiple of ALIGNED_ROWS.
template <class T> struct PackedSide {
    int64_t n;             // number of rows
    const int64_t* order;  // index in z of each row; NULL: the identity
    T* u;                  // (n, ld) rows, normalised if `normalize`
    T* panels;             // (n / panel, D, panel): u transposed, `panel` rows at a time; NULL: not needed
    T* norm;               // |z|
    // In place of panels, if the instruction set multiplies bfloat16 numbers:
    uint32_t* bfloats;        // (n, word_ld) words of the rows, each row scaled by a power of two
    uint32_t* bfloat_panels;  // (n / panel, n_words, panel): the words transposed, `panel` rows at a time; or NULL
    T* factors;               // u is this factor times the row in `bfloats`
    Id<T>* ids;               // group id; -1 beyond n
    double* sums;             // sum exp(k s) if direct, sum exp(k s - peak) if shifted; softplus: sum log(1 + exp(x))
    double* slopes;           // softplus: sum of d log(1 + exp(x)) / dx
    T* peaks;                 // shifted: largest k s so far
    T* weights;               // backward: w exp(-nu) if direct, w if shifted or softplus; 0 beyond n
    T* nu;                    // backward, shifted: neg_lse; +inf for a row without negatives
    T* limits;                // limited tiles: largest exp(k s) that counts for the row, or largest k s if shifted
    T* gathered;              // (n, ld) sum_j G_ij u_j; NULL: not wanted
};

// A tile of the similarity matrix: a block of rows against a block of columns.
template <class T> struct Tile {
    PackedSide<T>* rows;
    PackedSide<T>* cols;
    int64_t D, ld;
    int64_t n_words, word_ld;  // words_of(D), word_row_length(ld)
    int64_t row0, n_rows;      // multiples of ALIGNED_ROWS, except at the end of the side
    int64_t col0, n_cols;
    bool diagonal;   // rows and columns coincide: the whole tile is formed, but adds only to the rows
    bool masked;     // some ids may agree, or the last panel is incomplete
    bool shifted;    // logits may overflow the exponential
    bool limited;    // rows leave out similarities above their limits
    bool agreeing;   // only pairs of different rows with equal ids count; implies masked and shifted
    bool positives;  // softplus: pairs with equal ids add log(1 + exp(-x)) instead of nothing
    T inv_tau, bias;
    int64_t edge;  // rows and columns of a full tile; row stride of exps and buffer
    T* exps;       // (edge, edge) exponentials (bfloat16: products) kept from forward to backward; or NULL
    T* buffer;     // (edge, edge) scratch of the thread
    T* sums;       // (edge, lanes + 1) scratch of the thread; twice that for softplus
    // If the instruction set multiplies bfloat16 numbers:
    uint32_t* bfloats;  // (edge, words_of(edge)) scratch of the thread
    double* radial;     // for the temperature's gradient: a backward adds its sum of G_ij s_ij, with G not yet rounded
};

template <class T> struct Kernels {
    int lanes;               // row strides are multiples of this
    int panel;               // columns of a register block
    bool multiplies_bfloat;  // serves bfloat16 rows only, without widening them

    // Convert, normalise, pad and pack rows [first, last) of a side, whose rows are the rows of z[0] followed by the
    // rows of z[1]. `first` and `last` are multiples of ALIGNED_ROWS. Return the largest squared length of a row before
    // normalisation.
    double (*load_rows)(const PackedSide<T>& side, const fntx_matrix* z, int dtype, int64_t D, int64_t ld,
                        bool normalize, T eps, int64_t first, int64_t last);

    // Add the tile's sums to the sums of its rows and, unless the tile is diagonal, to the sums of its columns.
    void (*forward)(const Tile<T>& tile);

    // Run `forward`, and add exp(k s) U_cols to the rows' `gathered`. NULL if the instruction set multiplies bfloat16
    // numbers, because `radial` needs the weights.
    void (*forward_and_gather)(const Tile<T>& tile);

    // Add G U_cols to the rows' `gathered` and, unless the tile is diagonal, G^T U_rows to the columns' `gathered`.
    void (*backward)(const Tile<T>& tile);

    // Add the tile's sums and slopes of softplus(k s + b) like `forward`, and gather like `backward`.
    void (*softplus)(const Tile<T>& tile);

    // For an agreeing tile: add log(1 + exp(nu_i - k s_ij)) to the sums of rows and columns, and its slope to their
    // slopes.
    void (*pairs)(const Tile<T>& tile);

    // The backward of `pairs`: gather like `backward`, with G_ij = -(a_i slope_ij + a_j slope_ji), where a_i is the
    // weight of row or column i.
    void (*pairs_backward)(const Tile<T>& tile);

    double (*dot)(const T* a, const T* b, int64_t ld);
    void (*add_scaled)(T* a, T x, const T* b, int64_t ld);  // a += x b
    void (*exp2)(const T* x, T scale, T* y, int64_t n);     // y = 2^(x scale), by the exponential that tiles use
};

}  // namespace fntx
