// The kernel for float16 embeddings.
#include "kernel.h"
#include "kernels.h"

namespace fntx {
namespace {
__global__ void __launch_bounds__(THREADS, 1) nt_xent(const __grid_constant__ Arguments a) { run<Half>(a); }
}  // namespace

Kernel half_kernel() { return nt_xent; }

}  // namespace fntx
