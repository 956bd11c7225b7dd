// What one instruction set implements: the functions of `Kernels`, and the memory they share with the schedule.
#pragma once

#include <stdint.h>

#include "fastntxent.h"

namespace fntx {

// Rows and columns of a block are a multiple of this, as are the rows that a side allocates: every instruction set's
// register block divides it.
constexpr int64_t ALIGNED_ROWS = 48;

// A copy of bfloat16 rows has two numbers in each word of 32 bits: the words of n numbers, padded to whole registers.
constexpr int64_t WORDS_OF_REGISTER = 16;
constexpr int64_t words_of(int64_t n) {
    return (n + 2 * WORDS_OF_REGISTER - 1) / (2 * WORDS_OF_REGISTER) * WORDS_OF_REGISTER;
}

constexpr int64_t COMPETING_BYTES = 1024;  // rows a multiple of it apart fall on the same few lines of the first cache

// Words from one such row to the next, where rows of floats are ld apart.
constexpr int64_t word_row_length(int64_t ld) {
    return words_of(ld) * 4 % COMPETING_BYTES ? words_of(ld) : words_of(ld) + WORDS_OF_REGISTER;
}

// Group ids, in integers as wide as T, so that comparing them gives masks of T's vectors.
template <class T> struct IdOf;
template <> struct IdOf<float> {
    typedef int32_t Type;
};
template <> struct IdOf<double> {
    typedef int64_t Type;
};
template <class T> using Id = typename IdOf<T>::Type;

// The rows of one side of the similarity matrix as the kernels take them. Matrices are row-major with `ld` elements a
// row, zero beyond D; everything is allocated up to a multiple of ALIGNED_ROWS.
template <class T> struct PackedSide {
    int64_t n;             // rows
    const int64_t* order;  // of each row, which of z's it is; NULL: the same
    T* u;                  // (n, ld) rows, normalised if asked
    T* panels;             // u transposed, `panel` rows at a time: (n / panel, D, panel); NULL: no columns of a tile
    T* norm;               // |z|
    // Instead of panels, where the set multiplies bfloat16 numbers:
    uint32_t* bfloats;        // (n, word_ld) words of the rows, each times a power of two
    uint32_t* bfloat_panels;  // the words transposed, `panel` rows at a time: (n / panel, n_words, panel); or NULL
    T* factors;               // u of a row is its factor times its row in bfloats
    Id<T>* ids;               // group, -1 beyond n
    double* sums;             // direct: sum exp(k s); shifted: the same times exp(-peak); softplus: sum log(1 + exp(x))
    double* slopes;           // softplus: sum d log(1 + exp(x)) / dx
    T* peaks;                 // shifted: the largest k s so far
    T* weights;               // backward: w exp(-nu) if direct, w if shifted or softplus; 0 beyond n
    T* nu;                    // backward, shifted; +inf where there is no negative
    T* limits;    // where the tile is limited, the largest exp(k s), or if shifted the largest k s, that the row counts
    T* gathered;  // (n, ld) sum_j G_ij u_j; NULL: not wanted
};

// A tile of the similarity matrix: a block of rows against a block of columns.
template <class T> struct Tile {
    PackedSide<T>* rows;
    PackedSide<T>* cols;
    int64_t D, ld;
    int64_t n_words, word_ld;  // words_of(D), word_row_length(ld)
    int64_t row0, n_rows;      // multiples of ALIGNED_ROWS, except where the side ends
    int64_t col0, n_cols;
    bool diagonal;   // the columns are the rows: formed whole, used from one side only
    bool masked;     // some ids may agree, or columns are missing in the last panel
    bool shifted;    // logits may leave the range of the exponential
    bool limited;    // a row leaves out what lies above its limit
    bool agreeing;   // pairs of the same id count instead, but for a row with itself; such a tile is masked and shifted
    bool positives;  // softplus: where ids agree, log(1 + exp(-x)) is added, instead of nothing
    T inv_tau, bias;
    int64_t edge;  // rows and columns of a full tile, and the row length of what follows
    T* exps;       // (edge, edge): a forward leaves its exponentials here, a backward finds them; or NULL. In their
                   // place, products of bfloat16 numbers
    T* buffer;     // (edge, edge) of the thread's own
    T* sums;       // (edge, lanes + 1) of the thread's own, of softplus twice that
    // Where the set multiplies bfloat16 numbers:
    uint32_t* bfloats;  // (edge, words_of(edge)) of the thread's own
    double* radial;     // a backward adds the tile's sum of G_ij s_ij: the temperature's gradient, free of G's rounding
};

template <class T> struct Kernels {
    int lanes;               // row lengths are a multiple of this
    int panel;               // columns of a register block
    bool multiplies_bfloat;  // takes bfloat16 rows alone, and does not widen them

    // Convert, normalise, pad and pack rows [first, last) of a side, whose rows are z[0]'s and then z[1]'s; both bounds
    // are multiples of ALIGNED_ROWS. Returns the largest |u|^2, before any normalisation.
    double (*load_rows)(const PackedSide<T>& side, const fntx_matrix* z, int dtype, int64_t D, int64_t ld,
                        bool normalize, T eps, int64_t first, int64_t last);

    // Add the tile's sums to its rows' and, unless it is diagonal, to its columns'.
    void (*forward)(const Tile<T>& tile);

    // The same, with exponentials themselves for G in what the rows gather: exp(k s) U_cols. NULL where the set
    // multiplies bfloat16 numbers: `radial` needs the weights.
    void (*forward_and_gather)(const Tile<T>& tile);

    // Add G U_cols to what the rows have gathered and, unless it is diagonal, G^T U_rows to what the columns have.
    void (*backward)(const Tile<T>& tile);

    // Add the tile's sums and slopes of softplus, x = k s + b, as `forward` does, and what it gathers as `backward`
    // does.
    void (*softplus)(const Tile<T>& tile);

    // Of an agreeing tile: add log(1 + exp(nu_i - k s_ij)), and its slope, to the sums of either side.
    void (*pairs)(const Tile<T>& tile);

    // Its backward, as `backward`: G_ij = -(a_i slope_ij + a_j slope_ji), with the weights a of either side.
    void (*pairs_backward)(const Tile<T>& tile);

    double (*dot)(const T* a, const T* b, int64_t ld);
    void (*add_scaled)(T* a, T x, const T* b, int64_t ld);  // a += x b
    void (*exp2)(const T* x, T scale, T* y, int64_t n);     // y = 2^(x scale), as the tiles' exponentials
};

}  // namespace fntx
