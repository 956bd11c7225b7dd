// The C interface of the CPU kernels: plain pointers and sizes, without Python or PyTorch.
//
// A call computes neg_lse of the given rows, or the gradient of neg_lse, or both; or it computes a loss, with or
// without its gradient. With two views the loss is NT-Xent. With rows against columns it is InfoNCE or CLIP. Let
// k = inv_tau, u_i = z_i / max(|z_i|, eps) for row i, and v_j the same for column j. (Without `normalize`, u_i = z_i.)
//
//     nu_i  = log sum over {j : id_j != id_i} of exp(k u_i . v_j)     neg_lse of a row; for a column, the sum is over i
//     pi_i  = k u_i . u_p(i)                                          pos: p(i) is the same row of the other view
//     pi_i  = k u_i . v_i                                             with columns: the pair of row i and column i
//     loss  = sum_i w log(1 + exp(nu_i - pi_i))                       w: loss_weight; for columns, cols_loss_weight
//
// With classes, the positives of row i are the c_i other rows of its class. In FNTX_OUT (SupCon's L_out), nu_i leaves
// out only row i itself. Below, sum_i is over the rows with c_i > 0, and sum_j is over the positives of row i:
//
//     loss  = sum_i w (nu_i - (1/c_i) sum_j k u_i . u_j)
//
// In the other forms, nu_i leaves out the whole class of row i. With lse_i = log sum_j exp(k u_i . u_j):
//
//     FNTX_IN     loss = sum_i w (log(1 + exp(nu_i - lse_i)) + log c_i)
//     FNTX_RATIO  the same without log c_i
//     FNTX_PAIRS  loss = sum_i (w / c_i) sum_j log(1 + exp(nu_i - k u_i . u_j))
//
// If every class has exactly two rows, all four forms equal NT-Xent and are computed as NT-Xent.
//
// With limits, the sum of row i leaves out every column with u_i . v_j > limit_i. A NaN similarity stays in the sum.
//
// In a symmetric call (no columns given), the rows are also the columns, and each row has only one neg_lse.
//
// The formulas above are for FNTX_LOG_SUM_EXP. FNTX_SOFTPLUS and FNTX_SIGMOID replace nu_i with a different sum. With
// x_ij = k u_i . v_j + b:
//
//     FNTX_SOFTPLUS  nu_i = sum over {j : id_j != id_i} of log(1 + exp(x_ij))
//                    loss = sum_i w (nu_i + log(1 + exp(-pi_i - b)))
//     FNTX_SIGMOID   nu_i = the same sum + sum over {j : id_j = id_i} of log(1 + exp(-x_ij))
//                    loss = sum_i w nu_i
//
// The loss of FNTX_SOFTPLUS is NT-Logistic, and the loss of FNTX_SIGMOID is SigLIP. FNTX_SIGMOID needs columns, because
// in a symmetric call each row would count as a positive of itself.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// FNTX_TOO_LARGE: a side has more than FNTX_MOST_ROWS rows, or so many features that its size in bytes may not fit in
// 64 bits.
enum fntx_status { FNTX_OK = 0, FNTX_INTERRUPTED = 1, FNTX_NO_MEMORY = 2, FNTX_INVALID = 3, FNTX_TOO_LARGE = 4 };
#define FNTX_MOST_ROWS INT32_MAX
enum fntx_dtype { FNTX_FLOAT16 = 0, FNTX_BFLOAT16 = 1, FNTX_FLOAT32 = 2, FNTX_FLOAT64 = 3 };
enum fntx_phases { FNTX_FORWARD = 1, FNTX_BACKWARD = 2 };
enum fntx_functions { FNTX_LOG_SUM_EXP = 0, FNTX_SOFTPLUS = 1, FNTX_SIGMOID = 2 };
enum fntx_forms { FNTX_OUT = 0, FNTX_IN = 1, FNTX_RATIO = 2, FNTX_PAIRS = 3 };

// An (n, D) matrix of the call's dtype. Strides are in elements.
struct fntx_matrix {
    const void* data;
    int64_t n;
    int64_t stride_row;
    int64_t stride_col;
};

// One side of the similarity matrix: the rows of two matrices, concatenated (one of the two may have n = 0). Vectors
// have one element per row. Vectors (except ids) and gradients have the accumulation type: double for FNTX_FLOAT64,
// otherwise float.
struct fntx_side {
    struct fntx_matrix z[2];
    const int64_t* ids;     // group of each row, 0 to INT32_MAX; NULL: the row's index within its matrix
    const void* limits;     // largest similarity that counts in each row's sum; NULL: see `limited`
    void* neg_lse;          // output of a forward, or NULL; input of a backward without a forward
    const void* d_neg_lse;  // upstream gradient, for a backward; NULL: zero. Ignored if the call computes a loss
    void* d_z[2];           // contiguous (n, D) gradients; NULL: not wanted
};

// M is the number of rows in `rows`. Vectors (except classes) and 0-d outputs have the accumulation type.
struct fntx_call {
    int phases;    // bits of fntx_phases
    int function;  // one of fntx_functions
    int dtype;     // one of fntx_dtype
    int normalize;
    int threads;  // maximum number of threads
    int64_t D;
    double inv_tau;  // k
    double bias;     // b
    int limited;     // 1: if `limits` is NULL, limit_i = limit_scale pi_i / k + limit_shift (FNTX_LOG_SUM_EXP with pi)
    double limit_scale;
    double limit_shift;
    double eps;
    struct fntx_side rows;
    const struct fntx_side* cols;  // NULL: symmetric
    void* pos;                     // (M,) out: pi, of a symmetric forward with two views; or NULL
    const void* d_pos;             // (M,) in: upstream gradient of pos, for a backward with two views; or NULL
    const void* against;           // (M,) in: replaces pi_i, for any numbers of rows and columns; or NULL
    void* d_against;               // (M,) out: gradient of `against`; or NULL
    const int64_t* classes;        // (M,) in: class of each row, for a symmetric loss without ids and neg_lse; or NULL
    int form;                      // one of fntx_forms, with classes
    int mean_of_classes;           // divide loss_weight by the number of rows that have a positive
    // 0-d out, forward: the weighted sum of the losses; or NULL. It requires one of these: two views, equal numbers of
    // rows and columns, FNTX_SIGMOID, `against`, or classes.
    void* loss;
    double loss_weight;       // > 0
    double cols_loss_weight;  // >= 0; 0: only the rows have losses (InfoNCE)
    void* d_inv_tau;          // 0-d out, backward
    void* d_bias;             // 0-d out, backward of FNTX_SOFTPLUS and FNTX_SIGMOID
    int64_t workspace;        // maximum bytes for exponentials or products that the forward keeps for the backward
    // The calling thread calls `poll` at most once every 50 ms, and a non-zero result stops the call. NULL: no polling.
    // `poll` must return: if it ends the thread instead, the other threads of the team wait forever.
    int (*poll)(void);
};

// Run a call and return its status. Unless the status is FNTX_OK, the outputs are undefined.
int fntx_run(const struct fntx_call* call);

// Return the instruction set in use: "amx", "avx512_bf16", "avx512", "avx2" or "portable"; on aarch64 always "neon".
// The first two multiply bfloat16 rows in bfloat16, with float sums, and run the "avx512" kernels for all other dtypes.
const char* fntx_instruction_set(void);

// Switch to another instruction set, for tests. Return FNTX_OK, or FNTX_INVALID if the set cannot be used here.
int fntx_use_instruction_set(const char* name);

// Compute y_i = 2^x_i with the kernels' vectorised exponential, for results in the range of normal numbers. dtype is
// FNTX_FLOAT32 or FNTX_FLOAT64; return FNTX_INVALID for any other dtype.
int fntx_exp2(int dtype, const void* x, void* y, int64_t n);

#ifdef __cplusplus
}
#endif
