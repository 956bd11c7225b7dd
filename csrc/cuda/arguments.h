// What the kernel is told: the call, its cut into tasks, and where things lie in the workspace (plan.h sets all of it).
#pragma once

#include "fastntxent_cuda.h"

namespace fntx {

// The types of operands: float16, bfloat16, or float32 as the sum of two float16 parts.
struct Half {
    static constexpr int PARTS = 1;
    static constexpr bool BFLOAT = false;
};
struct Bfloat {
    static constexpr int PARTS = 1;
    static constexpr bool BFLOAT = true;
};
struct Split {
    static constexpr int PARTS = 2;
    static constexpr bool BFLOAT = false;
};

// A block: 32 rows, each shared by four warps that take a quarter of a tile's columns, so that small batches fill a
// device.
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int ROW_WARPS = 2, ROWS = 16 * ROW_WARPS;
constexpr int COL_WARPS = WARPS / ROW_WARPS;
constexpr int CHUNK = 64;  // features of a step
constexpr int GROUP = 3;   // most chunks of the gradient that a lane's registers hold; further ones form G once more
constexpr int PADDED_ROWS = 128;     // rows of a side are padded to a multiple: a tile's columns and rows divide it
constexpr int MOST_COL_SHARES = 16;  // whose parts of a row's sum a thread loads all at once
template <class Op> constexpr int COLS = 128 / Op::PARTS;  // columns of a tile: a step is 16 KiB
template <class Op> constexpr int WARP_COLS = COLS<Op> / COL_WARPS;
template <class Op> constexpr int STEP = COLS<Op> * CHUNK;  // elements of a step's columns, of one part

// The values of a tile's columns beside x; and for each 32 of them whether any may be of a row's group, or is not
// there.
template <class Op> struct ColumnVectors {
    int64_t ids[COLS<Op>];
    float r[COLS<Op>], w[COLS<Op>], nu[COLS<Op>];
    int masked[COLS<Op> / 32];
};

// One side of the similarity matrix as the kernels take it: its input, rows packed as u_i = r_i x_i, and the vectors of
// a forward and a backward.
struct PackedSide {
    fntx_matrix z[2];
    const int64_t* given_ids;
    int n, padded;
    uint16_t* x[2];  // (padded, DP): the parts of x
    float *r, *norm, *sim_pos;
    int64_t* ids;
    float *peaks, *sums;  // (col_shares, padded): log-sum-exp of a share's columns is peak + log(sum)
    float *nu, *w;        // nu: +inf where there is no negative
    float* longest;       // (blocks,): the largest norm that a block packed,
    float* largest_r;     // and the largest r
    float* neg_lse;
    const float* d_neg_lse;
    float* d_z[2];
};

struct Arguments {
    PackedSide sides[2];
    int n_sides;  // 1: symmetric
    int forward, backward, normalize;
    int paired;  // two views: row i of the one belongs to row i of the other
    int64_t D;
    int chunks;  // of a row
    float inv_tau;
    const float* inv_tau_ptr;
    float eps;
    float log_terms;  // log of the number of terms of a sum
    float* pos;
    const float* d_pos;
    float* loss;
    float loss_weight;
    float* d_inv_tau;
    float *row_losses, *row_d_inv_tau;  // terms of the loss, and of d_inv_tau
    int* arrived;                       // blocks whose work is done
    float* largest_w;                   // (blocks,): the largest weight that a block saw
    int col_shares;                     // tasks that share the columns of a block of rows in the forward
    int group;                          // chunks of a task of the gradient
    int stages;                         // steps held in shared memory: those of a group, and two on their way
    int resident;                       // whether all chunks of a block of rows stay in shared memory
};

}  // namespace fntx
