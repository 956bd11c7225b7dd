// The arguments of the kernel, set by plan.h: the call, how it is cut into tasks, and the layout of the workspace.
#pragma once

#include "fastntxent_cuda.h"

namespace fntx {

// The operand types: float16, bfloat16, and float32 as the sum of two float16 parts.
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

// A block has 32 rows. Four warps share a row, each with a quarter of a tile's columns, so that even small batches fill
// a device.
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int ROW_WARPS = 2, ROWS = 16 * ROW_WARPS;
constexpr int COL_WARPS = WARPS / ROW_WARPS;
constexpr int CHUNK = 64;            // features of a step
constexpr int GROUP = 3;             // chunks whose gradient fits in registers; for further chunks, G is formed again
constexpr int PADDED_ROWS = 128;     // sides are padded to a multiple of this; a tile's rows and columns divide it
constexpr int MOST_COL_SHARES = 16;  // a thread loads a row's sums of all shares at once
template <class Op> constexpr int COLS = 128 / Op::PARTS;  // columns of a tile; 16 KiB in each step
template <class Op> constexpr int WARP_COLS = COLS<Op> / COL_WARPS;
template <class Op> constexpr int STEP = COLS<Op> * CHUNK;  // elements of one part of a step's columns

// The vectors of a tile's columns. masked: for each 32 columns, whether any of them may share a group with one of the
// rows or lies beyond the last column.
template <class Op> struct ColumnVectors {
    int64_t ids[COLS<Op>];
    float r[COLS<Op>], w[COLS<Op>], nu[COLS<Op>];
    int masked[COLS<Op> / 32];
};

// One side of the similarity matrix in the form that the kernels use: its inputs, the rows packed as u_i = r_i x_i, and
// the vectors of forward and backward.
struct PackedSide {
    fntx_matrix z[2];
    const int64_t* given_ids;
    int n, padded;
    uint16_t* x[2];  // (padded, chunks * CHUNK): the parts of x
    float *r, *norm, *sim_pos;
    int64_t* ids;
    float *peaks, *sums;  // (col_shares, padded): a share's log-sum-exp is peak + log(sum)
    float *nu, *w;        // nu: +inf for padding, and for a row without negatives
    float* longest;       // (blocks,): largest norm that each block packed
    float* largest_r;     // (blocks,): largest r that each block packed
    float* neg_lse;
    const float* d_neg_lse;
    float* d_z[2];
};

struct Arguments {
    PackedSide sides[2];
    int n_sides;  // 1: symmetric
    int forward, backward, normalize;
    int paired;  // two views: row i of one view is the positive of row i of the other view
    int64_t D;
    int chunks;  // chunks of a row
    float inv_tau;
    const float* inv_tau_ptr;
    float eps;
    float log_terms;  // log of the largest number of terms in a sum
    float* pos;
    const float* d_pos;
    float* loss;
    float loss_weight;
    float* d_inv_tau;
    float *row_losses, *row_d_inv_tau;  // each row's terms of loss and d_inv_tau
    int* arrived;                       // number of blocks that have finished
    float* largest_w;                   // (blocks,): largest |w| that each block saw
    int col_shares;                     // number of tasks that share the columns of a block of rows in the forward
    int group;                          // chunks of features in a task of the gradient
    int stages;                         // steps in shared memory: a group's steps, and two in flight
    int resident;                       // whether all chunks of a block of rows stay in shared memory
};

}  // namespace fntx
