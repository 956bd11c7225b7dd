// The functions of device.h for a host compiler: a fiber for each thread of the grid, in one thread of the process.
//
// Between two collectives (barriers, shuffles, matrix operations), warps run in a random order. All 32 lanes of a warp
// must reach the same collective. Products of the matrix units follow PTX's fragment layouts and round like the chip
// that add_as has set. An asynchronous copy happens at random either when it is started or when its thread waits for
// it. So code that reads too early, or that overwrites data while another thread still reads it, may change the result.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#include "tensor_core.h"

#define FNTX_DEVICE inline
#define FNTX_UNROLL

namespace emulator {

// Run body on n_blocks blocks of n_threads threads. Each block has its own shared memory, which starts as NaN. Return
// false, with the reason in failure(), if the threads wait forever or misuse a collective or a copy.
bool launch(int n_blocks, int n_threads, size_t shared_bytes, const std::function<void()>& body);
const char* failure();
// Seed the random order of warps and copies.
void seed(unsigned value);
// Set the chip whose products are emulated.
void add_as(const TensorCore& core);

int thread();
int block();
int blocks();
char* shared_memory();
void sync_block();
void sync_grid();
void copy_async(void* to, const void* from);
void commit_copies();
void wait_copies(int pending);

// Wait until all lanes of the warp have called this. Then `act` runs once. It gets every lane's `mine`, and may write
// to it.
typedef void (*Act)(void** of_lanes);
void meet(void* mine, Act act);

template <class T> struct Shuffle {
    T value, result;
    int mask;
};

struct Matrices {
    uint32_t* fragment;
    const uint16_t* row;
};
void load_matrices(void** of_lanes);
void load_matrices_transposed(void** of_lanes);

struct Product {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
};
void multiply_half(void** of_lanes);
void multiply_bfloat(void** of_lanes);

}  // namespace emulator

namespace fntx {

inline int thread() { return emulator::thread(); }
inline int block() { return emulator::block(); }
inline int blocks() { return emulator::blocks(); }
inline char* shared_memory() { return emulator::shared_memory(); }
inline void sync_block() { emulator::sync_block(); }
inline void sync_grid() { emulator::sync_grid(); }
inline void copy_async(void* to, const void* from) { emulator::copy_async(to, from); }
inline void commit_copies() { emulator::commit_copies(); }
template <int PENDING> void wait_copies() { emulator::wait_copies(PENDING); }

template <class T> T shuffle_xor(T value, int mask) {
    emulator::Shuffle<T> mine = {value, value, mask};
    emulator::meet(&mine, [](void** of_lanes) {
        auto** all = reinterpret_cast<emulator::Shuffle<T>**>(of_lanes);
        for (int i = 0; i < 32; ++i) all[i]->result = all[i ^ all[i]->mask]->value;
    });
    return mine.result;
}

inline int count_arrival(int* arrived) { return (*arrived)++; }
inline bool any_of_warp(bool x) {
    FNTX_UNROLL for (int mask = 16; mask; mask /= 2) x |= shuffle_xor(x, mask);
    return x;
}

inline void load_matrices(uint32_t (&fragment)[4], const void* row) {
    emulator::Matrices mine = {fragment, static_cast<const uint16_t*>(row)};
    emulator::meet(&mine, emulator::load_matrices);
}
inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
    emulator::Matrices mine = {fragment, static_cast<const uint16_t*>(row)};
    emulator::meet(&mine, emulator::load_matrices_transposed);
}

template <class Op> void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulator::Product mine = {c, a, {b0, b1}};
    emulator::meet(&mine, Op::BFLOAT ? emulator::multiply_bfloat : emulator::multiply_half);
}

// Return 2^x, with zero in place of a subnormal result, like ex2.approx.ftz.
inline float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0 : y;
}

inline uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline uint16_t to_bits(Bfloat, float x) {
    const uint32_t bits = float_bits(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bits(Bfloat, uint16_t x) { return bits_float(uint32_t(x) << 16); }

inline uint16_t to_bits(Half, float x) {
    const uint16_t sign = uint16_t(float_bits(x) >> 16 & 0x8000);
    if (x != x) return 0x7fff;
    const float size = fabsf(x);
    if (size >= 65520) return sign | 0x7c00;
    int exponent = -13;
    if (size >= 6.103515625e-5f) frexpf(size, &exponent);               // smaller numbers have the least exponent
    const int fraction = int(nearbyintf(ldexpf(size, 11 - exponent)));  // a fraction of 2048 carries into the exponent
    return uint16_t(sign + (exponent + 13) * 1024 + fraction);
}
inline float from_bits(Half, uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
    return bits_float(sign | float_bits(float(fraction) * 5.9604644775390625e-8f));
}
inline uint16_t to_bits(Split, float x) { return to_bits(Half(), x); }
inline float from_bits(Split, uint16_t x) { return from_bits(Half(), x); }

}  // namespace fntx
