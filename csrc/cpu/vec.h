// Vectors of one register, written with the vector extensions of GCC and Clang. This file is compiled once for each
// instruction set, with the flags and the register width of the set. Everything here is in a namespace that is named
// after the set, so that the linker cannot mix the code of two sets.
#pragma once

#include <stdint.h>

#include "../ranges.h"

#if defined(__AVX512F__)
#if defined(__AMX_BF16__) || defined(FNTX_EMULATE_AMX)  // FNTX_EMULATE_AMX needs FNTX_EMULATE
#define FNTX_ISA amx
#define FNTX_BFLOAT  // multiply bfloat16 rows without widening them
#define FNTX_TILES   // multiply them in tile registers
#elif defined(__AVX512BF16__) || defined(FNTX_EMULATE_AVX512_BF16)
#define FNTX_ISA avx512_bf16
#define FNTX_BFLOAT
#else
#define FNTX_ISA avx512
#endif
#define FNTX_VECTOR_BYTES 64
#define FNTX_REGISTER_ROWS 8
#elif defined(__AVX2__)
#define FNTX_ISA avx2
#define FNTX_VECTOR_BYTES 32
#define FNTX_REGISTER_ROWS 4
#elif defined(__aarch64__)
#define FNTX_ISA neon
#define FNTX_VECTOR_BYTES 16
#define FNTX_REGISTER_ROWS 8
#else
#define FNTX_ISA portable
#define FNTX_VECTOR_BYTES 16
#define FNTX_REGISTER_ROWS 4
#endif

#if defined(__aarch64__) && !defined(__clang__)
// GCC's scheduling before register allocation moves loads so far ahead that 4 of a block's 24 accumulators are spilled
// (tests/test_arm.py checks for that) and exponentials take a quarter more instructions.
#pragma GCC optimize("no-schedule-insns")
#endif

#define FNTX_INLINE static inline __attribute__((always_inline))

namespace fntx::FNTX_ISA {

template <class T> struct Types;

template <> struct Types<float> {
    typedef float Vec __attribute__((vector_size(FNTX_VECTOR_BYTES)));
    typedef int32_t Bits __attribute__((vector_size(FNTX_VECTOR_BYTES)));
    typedef uint32_t Word __attribute__((vector_size(FNTX_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(FNTX_VECTOR_BYTES), aligned(4), may_alias));
};

template <> struct Types<double> {
    typedef double Vec __attribute__((vector_size(FNTX_VECTOR_BYTES)));
    typedef int64_t Bits __attribute__((vector_size(FNTX_VECTOR_BYTES)));
    typedef uint64_t Word __attribute__((vector_size(FNTX_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(FNTX_VECTOR_BYTES), aligned(8), may_alias));
};

template <class T> using Vec = typename Types<T>::Vec;
template <class T> using Bits = typename Types<T>::Bits;
template <class T> using Word = typename Types<T>::Word;
template <class T> constexpr int LANES = FNTX_VECTOR_BYTES / int(sizeof(T));

template <class T> FNTX_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename Types<T>::Unaligned*>(p);
}

template <class T> FNTX_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<typename Types<T>::Unaligned*>(p) = v; }

template <class T> FNTX_INLINE Vec<T> broadcast(T x) { return x - Vec<T>{}; }

// Return the sum of the lanes, added pairwise: the upper half to the lower half, until one lane is left.
template <class T> FNTX_INLINE T sum_of_lanes(Vec<T> v) {
    T lanes[LANES<T>];
    store<T>(lanes, v);
    for (int width = LANES<T> / 2; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

// --- 2^x -------------------------------------------------------------------------------------------------------------
// x = n + f, with n the nearest integer and |f| <= 1/2. 2^f is approximated by a minimax polynomial p(f) with p(0) = 1.
// Computed exactly, with the coefficients below, p has a relative error of 2.6e-9 (degree 6, float) or 4.2e-17 (degree
// 11, double). The coefficients and every step are rounded to the type, so the result is within 1.1 units in the last
// place of 2^x, or 1.4 without a fused multiply-add (tests/test_cpu_kernel.py measures the error against long double).

template <class T> struct Exp2;

template <> struct Exp2<float> {
    static constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    static constexpr int MANTISSA = 23;
    static constexpr uint32_t ONE = 0x3f800000;
    static constexpr float LEAST = -87.0f;  // just above the log of the smallest normal number
    static constexpr float COEFFICIENTS[] = {1.0f,
                                             0x1.62e4311733cb7p-1f,
                                             0x1.ebfbe2c540d82p-3f,
                                             0x1.c6ae72dfc2656p-5f,
                                             0x1.3b270e6417bb2p-7f,
                                             0x1.5f7276d809020p-10f,
                                             0x1.470b4a7656448p-13f};
    static constexpr int DEGREE = 6;
};

template <> struct Exp2<double> {
    static constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52
    static constexpr int MANTISSA = 52;
    static constexpr uint64_t ONE = 0x3ff0000000000000;
    static constexpr double LEAST = -708.0;
    static constexpr double COEFFICIENTS[] = {1.0,
                                              0x1.62e42fefa39f3p-1,
                                              0x1.ebfbdff82c598p-3,
                                              0x1.c6b08d7048f31p-5,
                                              0x1.3b2ab6fba1e1cp-7,
                                              0x1.5d87fe7bbbe07p-10,
                                              0x1.4309130961163p-13,
                                              0x1.ffcbee3b0af8cp-17,
                                              0x1.62bfd49ed0adfp-20,
                                              0x1.b54167a0b9061p-24,
                                              0x1.e605f979c7a5dp-28,
                                              0x1.c0638527edf34p-32};
    static constexpr int DEGREE = 11;
};

// Return 2^(x scale), for results in the range of normal numbers. With a fused multiply-add, the product x scale is not
// rounded.
template <class T> FNTX_INLINE Vec<T> exp2_in_range(Vec<T> x, Vec<T> scale) {
    using E = Exp2<T>;
    const Vec<T> biased = x * scale + E::ROUND, f = x * scale - (biased - E::ROUND);
    Vec<T> p = broadcast<T>(E::COEFFICIENTS[E::DEGREE]);
#pragma GCC unroll 12
    for (int i = E::DEGREE - 1; i >= 0; --i) p = p * f + E::COEFFICIENTS[i];
    // The shift drops high bits of every number, NaN and infinity included. It is unsigned, because a signed shift
    // would overflow. NaN stays NaN in the product.
    return p * (Vec<T>)(((Word<T>)biased << E::MANTISSA) + E::ONE);
}

// Return exp(x - shift), for results of at most about 1. Results below the normal numbers become 0.
template <class T> FNTX_INLINE Vec<T> exp_shifted(Vec<T> x, Vec<T> shift) {
    const Vec<T> least = broadcast<T>(Exp2<T>::LEAST), d = x - shift;
    const Vec<T> power = exp2_in_range<T>(d < least ? least : d, broadcast<T>(LOG2_E<T>));
    return d < least ? Vec<T>{} : power;
}

// --- softplus and sigmoid --------------------------------------------------------------------------------------------

template <class T> constexpr int LOG1P_TERMS = sizeof(T) == 4 ? 8 : 16;

// Return log(1 + exp(x)) with a small relative error, and set `slope` to its derivative 1 / (1 + exp(-x)). With
// e = exp(-|x|) and t = e / (2 + e) <= 1/3, log(1 + e) is 2 artanh(t), which is t times a series in t^2. Truncating the
// series changes log(1 + e) by less than 1.5e-9 (float) or 1.8e-17 (double) of its value.
template <class T> FNTX_INLINE Vec<T> softplus(Vec<T> x, Vec<T>& slope) {
    const Vec<T> e = exp_shifted<T>(x > 0 ? -x : x, Vec<T>{});
    const Vec<T> quotient = T(1) / ((e + T(1)) * (e + T(2)));  // one division for both quotients
    const Vec<T> inverse = quotient * (e + T(2)), t = e * (e + T(1)) * quotient, square = t * t;
    Vec<T> series = broadcast<T>(T(2) / (2 * LOG1P_TERMS<T> - 1));
#pragma GCC unroll 16
    for (int i = LOG1P_TERMS<T> - 2; i >= 0; --i) series = series * square + T(2) / (2 * i + 1);
    slope = x > 0 ? inverse : e * inverse;
    return (x > 0 ? x : Vec<T>{}) + t * series;
}

}  // namespace fntx::FNTX_ISA
