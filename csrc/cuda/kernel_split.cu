// The kernels of float32 embeddings.
#include "kernel.h"
#include "kernels.h"

namespace {
template <class Form> __global__ void __launch_bounds__(THREADS, 1) nt_xent(const __grid_constant__ Arguments a) {
    run<Split, Form>(a);
}
}  // namespace

Kernel split_kernel(bool tall) { return tall ? nt_xent<Tall> : nt_xent<Flat>; }
