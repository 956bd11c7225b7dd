// The C interface of the CUDA kernels: device pointers and sizes, no Python and no PyTorch. Sides, matrices, dtypes and
// phases are those of the CPU kernels, and so is what a call computes; FNTX_FLOAT64 is not served.
#pragma once

#include "../cpu/fastntxent.h"

#ifdef __cplusplus
extern "C" {
#endif

struct fntx_cuda_call {
    int phases;  // of fntx_phases
    int dtype;   // of z
    int normalize;
    int64_t D;
    float inv_tau;             // k
    const float* inv_tau_ptr;  // or where it is in device memory: the host does not look
    float eps;
    struct fntx_side rows;         // ids of any value
    const struct fntx_side* cols;  // NULL: symmetric
    float* pos;                    // (M,) out, forward, symmetric, two views; or NULL
    const float* d_pos;            // (M,) in, backward, with two views; or NULL
    float* loss;  // 0-d out: the sum of the losses, times loss_weight; forward, symmetric, two views; or NULL
    float loss_weight;
    float* d_inv_tau;  // 0-d out, backward
    void* workspace;   // fntx_cuda_workspace bytes, 16-byte aligned; nothing of it has to be set
    int blocks;        // of the grid at most; 0: as many as run at once
    int device;
    void* stream;  // a cudaStream_t of that device
};

// Bytes of workspace for a call on n_rows rows and n_cols columns (0: symmetric), for a grid of at most
// `blocks` (0: as many as run at once); -1 on failure.
int64_t fntx_cuda_workspace(int device, int dtype, int64_t n_rows, int64_t n_cols, int64_t D, int blocks);

// Enqueue a call: one launch. On anything but FNTX_OK nothing was enqueued.
int fntx_cuda_run(const struct fntx_cuda_call* call);

// How many devices there are; -1 on failure.
int fntx_cuda_devices(void);

// Why the last call of this thread that failed did: the name of the CUDA function and its own words.
const char* fntx_cuda_error(void);

#ifdef __cplusplus
}
#endif
