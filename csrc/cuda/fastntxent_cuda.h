// The C interface of the CUDA kernels: device pointers and sizes, without Python or PyTorch. Sides, matrices, dtypes,
// phases and status codes are defined as for the CPU kernels, with these differences:
// - FNTX_FLOAT64 is not supported, and the limits of a side are ignored.
// - The first matrix of a side must have rows. Too many rows or features are FNTX_INVALID.
// - d_neg_lse must be NULL in a call that computes `loss` and gradients, and must be given in any other backward.
#pragma once

#include "../cpu/fastntxent.h"

#ifdef __cplusplus
extern "C" {
#endif

struct fntx_cuda_call {
    int phases;  // bits of fntx_phases
    int dtype;   // one of fntx_dtype
    int normalize;
    int64_t D;
    float inv_tau;             // k
    const float* inv_tau_ptr;  // if not NULL, k in device memory, which the host does not read
    float eps;
    struct fntx_side rows;         // ids may be any 64-bit integers
    const struct fntx_side* cols;  // NULL: symmetric
    float* pos;                    // (M,) out: pi, of a symmetric forward with two views; or NULL
    const float* d_pos;            // (M,) in: upstream gradient of pos (backward with two views, no `loss`); or NULL
    float* loss;                   // 0-d out: sum of the losses times loss_weight, of a forward with two views; or NULL
    float loss_weight;
    float* d_inv_tau;  // 0-d out, backward
    void* workspace;   // as many bytes as fntx_cuda_workspace returns, 16-byte aligned; need not be initialised
    int blocks;        // maximum size of the grid; 0 or less: as many blocks as run at once
    int device;
    void* stream;  // a cudaStream_t of that device
};

// Return the size in bytes of the workspace for a call on n_rows rows and n_cols columns (0: symmetric) with a grid of
// at most `blocks` blocks (0 or less: as many as run at once), or -1 on failure.
int64_t fntx_cuda_workspace(int device, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, int blocks);

// Enqueue a call as one launch, and return a status. Unless the status is FNTX_OK, nothing was enqueued.
int fntx_cuda_run(const struct fntx_cuda_call* call);

// Return the number of devices, or -1 on failure.
int fntx_cuda_devices(void);

// Return why this thread's latest call failed: the name of the function that failed (or "the device"), and the reason.
// Undefined unless that call failed.
const char* fntx_cuda_error(void);

#ifdef __cplusplus
}
#endif
