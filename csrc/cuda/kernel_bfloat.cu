// The kernels of bfloat16 embeddings.
#include "kernel.h"
#include "kernels.h"

namespace fntx {
namespace {
template <class Form> __global__ void __launch_bounds__(THREADS, 1) nt_xent(const __grid_constant__ Arguments a) {
    if constexpr (RUNS_HERE<Form>) run<Bfloat, Form>(a);
}
}  // namespace

Kernel bfloat_kernel(int form) { return form == TALL ? nt_xent<Tall> : form == FLAT ? nt_xent<Flat> : nt_xent<Hopper>; }

}  // namespace fntx
