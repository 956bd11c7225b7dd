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

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int COLS = 64;        // columns of a tile, and rows of a span of ids
constexpr int CHUNK = 64;       // features of a step
constexpr int PADDED_ROWS = 128;

// How the warps of a block stand, and how many chunks of the gradient a lane's registers may hold (GROUP). A row's
// features beyond a group cost the first product once more.
struct Tall {  // many rows: 128 of them, each a single warp's
    static constexpr int ROW_WARPS = 8, GROUP = 2;
    static constexpr bool WARPGROUPS = false;
};
struct Flat {  // few rows: 32, where four warps share a row's columns, so that there are more blocks
    static constexpr int ROW_WARPS = 2, GROUP = 3;
    static constexpr bool WARPGROUPS = false;
};
struct Hopper {  // as Tall, by the products of warpgroups, which take their operands from shared memory: sm_90a alone
    static constexpr int ROW_WARPS = 8, GROUP = 3;
    static constexpr bool WARPGROUPS = true;
};
enum { TALL, FLAT, HOPPER };
template <class Form> constexpr int ROWS = 16 * Form::ROW_WARPS;
template <class Form> constexpr int COL_WARPS = WARPS / Form::ROW_WARPS;
template <class Form> constexpr int WARP_COLS = COLS / COL_WARPS<Form>;

// One side: its input, rows packed as u_i = r_i x_i, and the vectors of a forward and a backward.
struct Side {
    fntx_matrix z[2];
    const int64_t* given_ids;
    int n, padded;
    uint16_t* x[2];           // (padded, DP): the parts of x
    float *r, *norm, *sim_pos;
    int64_t* ids;
    int64_t *low, *high;      // smallest and largest id of each COLS rows
    float *peaks, *sums;      // (splits, padded): log-sum-exp of a split's columns is peak + log(sum);
                              // or of a triangle (blocks, padded), sums alone
    float *nu, *w;            // nu: +inf where there is no negative
    float* longest;           // (blocks,): the largest norm that a block packed,
    float* largest_r;         // and the largest r
    float* neg_lse;
    const float* d_neg_lse;
    float* d_z[2];
};

struct Arguments {
    Side sides[2];
    int n_sides;              // 1: symmetric
    int forward, backward, normalize;
    int paired;               // two views: row i of the one belongs to row i of the other
    int64_t D;
    int chunks;               // of a row
    float inv_tau;
    const float* inv_tau_ptr;
    float eps;
    float log_terms;          // log of the number of terms of a sum
    float* pos;
    const float* d_pos;
    float* loss;
    float loss_weight;
    float* d_inv_tau;
    float *row_losses, *row_shares;  // terms of the loss, and of d_inv_tau
    float* largest_w;         // (blocks,): the largest weight that a block saw
    int splits;               // tasks that share the columns of a block of rows in the forward
    int triangular;           // whether a tile of the forward is for its columns too, where exp cannot leave its range
    int group;                // chunks of a task of the gradient
    int stages;               // steps held in shared memory: those of a group, and two on their way
    int resident;             // whether all chunks of a block of rows stay in shared memory
};

}  // namespace fntx
