// The C interface of the CPU kernels: plain pointers and sizes, no Python and no PyTorch.
//
// One call computes neg_lse of given rows, its gradient, or loss and gradient together: NT-Xent's of two views,
// InfoNCE's and CLIP's of rows and columns. With k = inv_tau, rows u_i = z_i / max(|z_i|, eps) (or z_i as they are),
// columns v_j likewise:
//
//     nu_i  = log sum over {j : id_j != id_i} of exp(k u_i . v_j)      neg_lse of a row; of a column, the same over i
//     pi_i  = k u_i . u_p(i)                                           pos: p(i) is the same row of the other view
//     pi_i  = k u_i . v_i                                              with columns, of row i and of column i
//     loss  = sum_i w log(1 + exp(nu_i - pi_i))                        w: loss_weight; of columns cols_loss_weight
//
// With classes the rows j of row i's class are its positives, c_i in number, and nu_i leaves out row i alone (SupCon's
// L_out):
//
//     loss  = sum_i w (nu_i - (1/c_i) sum_j k u_i . u_j)                over the rows with c_i > 0
//
// That is FNTX_OUT. In the other forms nu_i leaves out the whole class, and with lse_i = log sum_j exp(k u_i . u_j)
// over the positives
//
//     FNTX_IN     loss = sum_i w (log(1 + exp(nu_i - lse_i)) + log c_i)
//     FNTX_RATIO  the same without log c_i
//     FNTX_PAIRS  loss = sum_i (w / c_i) sum_j log(1 + exp(nu_i - k u_i . u_j))
//
// Where every class has two rows all of them are NT-Xent, and are formed as such.
//
// Where there are limits, a row's sum leaves out what is more similar to it: u_i . v_j > limit_i. A NaN stays.
//
// Symmetric (no columns given): the rows are their own columns, and each row has one neg_lse.
//
// Other functions put another sum in the place of nu_i. With x_ij = k u_i . v_j + b:
//
//     FNTX_SOFTPLUS  nu_i = sum over {j : id_j != id_i} of log(1 + exp(x_ij)),  loss = sum_i w (nu_i + log(1 +
//     exp(-pi_i - b))) FNTX_SIGMOID   nu_i = the same sum + sum over {j : id_j = id_i} of log(1 + exp(-x_ij)),  loss =
//     sum_i w nu_i
//
// The first with its loss is NT-Logistic, the second SigLIP. FNTX_SIGMOID is between rows and columns: a row of a
// symmetric call is no positive of itself.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// FNTX_TOO_LARGE: a side of more than FNTX_MOST_ROWS rows, or of more features than a 64-bit size can count the bytes
// of.
enum fntx_status { FNTX_OK = 0, FNTX_INTERRUPTED = 1, FNTX_NO_MEMORY = 2, FNTX_INVALID = 3, FNTX_TOO_LARGE = 4 };
#define FNTX_MOST_ROWS INT32_MAX
enum fntx_dtype { FNTX_FLOAT16 = 0, FNTX_BFLOAT16 = 1, FNTX_FLOAT32 = 2, FNTX_FLOAT64 = 3 };
enum fntx_phases { FNTX_FORWARD = 1, FNTX_BACKWARD = 2 };
enum fntx_functions { FNTX_LOG_SUM_EXP = 0, FNTX_SOFTPLUS = 1, FNTX_SIGMOID = 2 };
enum fntx_forms { FNTX_OUT = 0, FNTX_IN = 1, FNTX_RATIO = 2, FNTX_PAIRS = 3 };

// An (n, D) matrix of the call's dtype; strides in elements.
struct fntx_matrix {
    const void* data;
    int64_t n;
    int64_t stride_row;
    int64_t stride_col;
};

// One side of the similarity matrix: the rows of two matrices, one after the other (the second may have n = 0).
// Vectors have one element per row; they and the gradients are of the accumulation type: double for FNTX_FLOAT64,
// else float.
struct fntx_side {
    struct fntx_matrix z[2];
    const int64_t* ids;     // group of each row, >= 0; NULL: the row's index within its matrix
    const void* limits;     // of each row, the largest similarity that its sum takes; NULL: see limited
    void* neg_lse;          // written by a forward, read by a backward without one
    const void* d_neg_lse;  // weights of a backward; NULL where the call forms them itself (`loss`)
    void* d_z[2];           // (n, D) gradients, contiguous; NULL: not wanted
};

struct fntx_call {
    int phases;    // of fntx_phases
    int function;  // of fntx_functions
    int dtype;     // of z
    int normalize;
    int threads;  // at most so many
    int64_t D;
    double inv_tau;      // k
    double bias;         // b
    int limited;         // log-sum-exp of rows that have positives: a row without `limits` has this one, of its
    double limit_scale;  // similarity to its positive: limit_scale u_i . u_p(i) + limit_shift
    double limit_shift;
    double eps;
    struct fntx_side rows;
    const struct fntx_side* cols;  // NULL: symmetric
    void* pos;                     // (M,) out, forward, symmetric, two views; or NULL
    const void* d_pos;             // (M,) in, backward, with two views; or NULL
    const void* against;     // (M,) in, of a loss: what takes the place of pi_i, of rows against any columns; or NULL
    void* d_against;         // (M,) out, its gradient; or NULL
    const int64_t* classes;  // (M,) in, of a symmetric loss in the place of ids and without neg_lse; or NULL
    int form;                // of fntx_forms, with classes
    int mean_of_classes;     // loss_weight is divided by the number of rows that have a positive
    void* loss;  // 0-d out: the weighted sum of the losses; forward; two views, as many columns as rows, or classes; or
                 // NULL
    double loss_weight;       // > 0
    double cols_loss_weight;  // >= 0; 0: the rows' losses alone (InfoNCE)
    void* d_inv_tau;          // 0-d out, backward
    void* d_bias;             // 0-d out, backward of softplus and sigmoid
    int64_t workspace;        // bytes of exponentials that may be kept from the forward to the backward
    // Called by the calling thread every 50 ms; anything but 0 stops the call. NULL: no poll. It has to return: a
    // thread that ends in here leaves its team behind.
    int (*poll)(void);
};

// Run a call. On anything but FNTX_OK the outputs hold nothing of use.
int fntx_run(const struct fntx_call* call);

// The instruction set that fntx_run uses here: "amx", "avx512_bf16", "avx512", "avx2" or "portable"; on aarch64 always
// "neon". The first two multiply bfloat16 rows in bfloat16, with float sums, and are "avx512" for all other rows.
const char* fntx_instruction_set(void);

// Use another one from now on: a test's way to reach them all. FNTX_INVALID if this machine cannot.
int fntx_use_instruction_set(const char* name);

// y_i = 2^x_i by the kernels' own vectorised exponential; dtype FNTX_FLOAT32 or FNTX_FLOAT64.
int fntx_exp2(int dtype, const void* x, void* y, int64_t n);

#ifdef __cplusplus
}
#endif
