// The instructions for bfloat16 numbers, each as a function: VDPBF16PS and VCVTNEPS2BF16 (AVX512_BF16), and tiles
// (AMX). With FNTX_EMULATE, the same functions are AVX-512 code that rounds according to Intel's manual, so that
// check.cpp can test the kernels on processors without the instructions. The emulation of AVX512_BF16 agreed bit for
// bit with a real processor on 48 million random lanes, which included NaN and subnormal numbers.
//
// A pair is two bfloat16 numbers in a 32-bit word; the low half holds the number with the even index. In a product,
// each row of the left operand holds pairs of one matrix row, and each row of the right operand holds one pair of every
// matrix column.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "vec.h"

namespace fntx::FNTX_ISA {

typedef Word<float> BfloatPairs;
typedef uint16_t Halves __attribute__((vector_size(FNTX_VECTOR_BYTES / 2)));  // bfloat16 numbers

#ifdef FNTX_EMULATE

FNTX_INLINE Vec<float> without_subnormals(Vec<float> x) {
    const BfloatPairs bits = (BfloatPairs)x;
    return (Vec<float>)((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}

FNTX_INLINE Vec<float> even(BfloatPairs pairs) { return without_subnormals((Vec<float>)(pairs << 16)); }
FNTX_INLINE Vec<float> odd(BfloatPairs pairs) { return without_subnormals((Vec<float>)(pairs & 0xffff0000)); }

FNTX_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
    return without_subnormals((Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c));
}

#endif

// Return c + a b in each lane: the odd product is added first, then the even product, each with one rounding.
FNTX_INLINE Vec<float> add_products(Vec<float> c, BfloatPairs a, BfloatPairs b) {
#ifdef FNTX_EMULATE
    return fused(even(a), even(b), fused(odd(a), odd(b), without_subnormals(c)));
#else
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
}

// Round to bfloat16, to nearest with ties to even. NaN stays NaN, and subnormal numbers become zero.
FNTX_INLINE Halves to_bfloat(Vec<float> x) {
#ifdef FNTX_EMULATE
    const BfloatPairs bits = (BfloatPairs)without_subnormals(x), rounded = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((x != x ? bits | 0x400000 : rounded) >> 16, Halves);
#else
    return (Halves)_mm512_cvtneps_pbh((__m512)x);
#endif
}

// --- tiles -----------------------------------------------------------------------------------------------------------
// A tile register has 16 rows of 64 bytes, which hold pairs of bfloat16 numbers or float sums.

#ifdef FNTX_TILES

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // bytes of a row
constexpr int TILES = 8;

#ifdef FNTX_EMULATE

inline thread_local BfloatPairs tile_rows[TILES][TILE_ROWS];

// Return c + a B. Even and odd products are summed separately, and the total of both sums is added to c.
FNTX_INLINE Vec<float> add_tile_row(Vec<float> c, BfloatPairs a, const BfloatPairs* b) {
    Vec<float> evens = {}, odds = {};
    for (int i = 0; i < TILE_ROWS; ++i) {
        const BfloatPairs a_i = a[i] - BfloatPairs{};
        evens = fused(even(a_i), even(b[i]), evens);
        odds = fused(odd(a_i), odd(b[i]), odds);
    }
    return without_subnormals(without_subnormals(c) + without_subnormals(evens + odds));
}

#endif

// Configures the thread's tiles, and releases them at the end of the scope.
class UsingTiles {
  public:
#ifdef FNTX_EMULATE
    UsingTiles() { memset(tile_rows, 0xff, sizeof tile_rows); }
#else
    UsingTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_per_row[16] = {};
            uint8_t rows[16] = {};
        } shape;
        static_assert(sizeof shape == 64);
        for (int tile = 0; tile < TILES; ++tile) shape.bytes_per_row[tile] = TILE_BYTES, shape.rows[tile] = TILE_ROWS;
        __asm__ volatile("ldtilecfg %0" ::"m"(shape));
    }
    ~UsingTiles() { __asm__ volatile("tilerelease"); }
#endif
    UsingTiles(const UsingTiles&) = delete;
    UsingTiles& operator=(const UsingTiles&) = delete;
};

// The following functions are assembly because GCC 12's intrinsics do not tell the compiler that a tile is loaded from
// memory, so the compiler may drop stores that precede the load. Rows are `stride` words apart.

template <int TILE> FNTX_INLINE void zero_tile() {
#ifdef FNTX_EMULATE
    memset(tile_rows[TILE], 0, sizeof tile_rows[TILE]);
#else
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE));
#endif
}

template <int TILE> FNTX_INLINE void load_tile(const void* from, int64_t stride) {
#ifdef FNTX_EMULATE
    const char* const rows = static_cast<const char*>(from);
    for (int row = 0; row < TILE_ROWS; ++row) memcpy(&tile_rows[TILE][row], rows + 4 * row * stride, TILE_BYTES);
#else
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(4 * stride) : "memory");
#endif
}

template <int TILE> FNTX_INLINE void store_tile(void* to, int64_t stride) {
#ifdef FNTX_EMULATE
    char* const rows = static_cast<char*>(to);
    for (int row = 0; row < TILE_ROWS; ++row) memcpy(rows + 4 * row * stride, &tile_rows[TILE][row], TILE_BYTES);
#else
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(4 * stride) : "memory");
#endif
}

// C += A B, where C and B have 16 columns.
template <int C, int A, int B> FNTX_INLINE void multiply_tiles() {
#ifdef FNTX_EMULATE
    for (int row = 0; row < TILE_ROWS; ++row)
        tile_rows[C][row] = (BfloatPairs)add_tile_row((Vec<float>)tile_rows[C][row], tile_rows[A][row], tile_rows[B]);
#else
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
#endif
}

#endif

}  // namespace fntx::FNTX_ISA
