// The machine-dependent functions of the kernels: threads and barriers, matrix-unit operands, asynchronous copies. On a
// device these are CUDA's intrinsics and PTX instructions. A host compiler gets the same functions from
// host/emulator.h, so the whole kernel runs without a GPU.
#pragma once

#include "arguments.h"

#ifdef __CUDACC__

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fntx {

#define FNTX_DEVICE __device__ __forceinline__
#define FNTX_UNROLL _Pragma("unroll")

FNTX_DEVICE int thread() { return threadIdx.x; }
FNTX_DEVICE int block() { return blockIdx.x; }
FNTX_DEVICE int blocks() { return gridDim.x; }
FNTX_DEVICE void sync_block() { __syncthreads(); }
// Not inlined: otherwise a value that all calls have in common would occupy a register throughout the code between
// them.
__device__ __noinline__ inline void sync_grid() { cooperative_groups::this_grid().sync(); }
// Count this block as arrived, and return how many blocks arrived before it. The calling thread sees all writes of
// those blocks.
FNTX_DEVICE int count_arrival(int* arrived) {
    __threadfence();
    const int before = atomicAdd(arrived, 1);
    __threadfence();
    return before;
}
FNTX_DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
template <class T> FNTX_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

FNTX_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}

FNTX_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Start to copy 16 bytes to shared memory, bypassing the L1 cache.
FNTX_DEVICE void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
FNTX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most PENDING of this thread's committed groups are in flight.
template <int PENDING> FNTX_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Load four 8 x 8 matrices of 16-bit elements. Lane 8 m + i passes the address of row i of matrix m.
FNTX_DEVICE void load_matrices(uint32_t (&f)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                 : "r"(shared_address(row))
                 : "memory");
}
FNTX_DEVICE void load_matrices_transposed(uint32_t (&f)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(f[0]), "=r"(f[1]), "=r"(f[2]), "=r"(f[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8).
template <class Op> FNTX_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (Op::BFLOAT)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Return 2^x within two units in the last place, with zero in place of a subnormal result.
FNTX_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FNTX_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
FNTX_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// to_bits converts a float to 16 bits, rounding to nearest; from_bits converts 16 bits to a float.
FNTX_DEVICE uint16_t to_bits(Half, float x) { return __half_as_ushort(__float2half_rn(x)); }
FNTX_DEVICE uint16_t to_bits(Split, float x) { return to_bits(Half(), x); }
FNTX_DEVICE uint16_t to_bits(Bfloat, float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
FNTX_DEVICE float from_bits(Half, uint16_t x) { return __half2float(__ushort_as_half(x)); }
FNTX_DEVICE float from_bits(Split, uint16_t x) { return from_bits(Half(), x); }
FNTX_DEVICE float from_bits(Bfloat, uint16_t x) { return bits_float(uint32_t(x) << 16); }

}  // namespace fntx

#else
#include "host/emulator.h"
#endif
