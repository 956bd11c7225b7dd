// How the matrix units of a chip add products, for the emulated device.
//
// A block of products is added to the accumulator at once. The exponent of a product is the sum of its factors'
// exponents (the significand of the product is below 4 and is not normalised). A subnormal factor has the exponent of
// the smallest normal number. All products and the accumulator are shifted to the largest exponent among them. Each
// keeps float32's 23 bits of fraction and the chip's extra bits, and loses all lower bits. The rest is summed exactly,
// and the sum is cut to float32. Every rounding is toward zero. (Khattak and Mikaitis, Accurate models of NVIDIA tensor
// cores, doi 10.1145/3830409.)
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emulator {

// How many products are added at once, and how many extra bits are kept. If `block` is 0 or some number is not finite,
// sums are rounded to nearest, which no NVIDIA chip does.
struct TensorCore {
    int block = 0, extra_bits = 0;
};

// Return the exponent of the smallest normal number of an operand's type.
constexpr int least_exponent(bool bfloat) { return bfloat ? -126 : -14; }

inline int exponent_of(double x, int least) {
    if (x == 0) return -1000;
    uint64_t bits;
    memcpy(&bits, &x, 8);
    const int exponent = int(bits >> 52 & 2047) - 1023;
    return exponent < least ? least : exponent;
}

inline double power_of_2(int exponent) {
    const uint64_t bits = uint64_t(exponent + 1023) << 52;
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

// Cut a float64 number to float32, rounding toward zero.
inline float cut(double x) {
    const int exponent = exponent_of(x, -126);
    if (x == 0 || exponent > 127) return float(x);
    const double unit = power_of_2(exponent - 23);
    return float(double(int32_t(x / unit)) * unit);
}

// c += a b, for operands whose smallest normal number is 2^least.
template <int M, int N>
void multiply_add(const TensorCore& core, int least, float (&c)[M][N], const float (&a)[M][16],
                  const float (&b)[16][N]) {
    int of_a[M][16], of_b[16][N];
    float all = 0;  // NaN if any number is not finite
    for (int k = 0; k < 16; ++k) {
        for (int m = 0; m < M; ++m) of_a[m][k] = exponent_of(a[m][k], least), all += a[m][k] * 0;
        for (int n = 0; n < N; ++n) of_b[k][n] = exponent_of(b[k][n], least), all += b[k][n] * 0;
    }
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) all += c[m][n] * 0;
    if (core.block == 0 || all != all) {
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n) {
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
                c[m][n] += sum;
            }
        return;
    }
    for (int m = 0; m < M; ++m)
        for (int first = 0; first < 16; first += core.block) {
            int largest[N];
            double sum[N], per_unit[N];
            for (int n = 0; n < N; ++n) largest[n] = exponent_of(c[m][n], -126);
            for (int k = first; k < first + core.block; ++k)
                for (int n = 0; n < N; ++n) {
                    const int exponent = of_a[m][k] + of_b[k][n];
                    largest[n] = exponent > largest[n] ? exponent : largest[n];
                }
            for (int n = 0; n < N; ++n) {
                largest[n] = largest[n] < -133 ? -133 : largest[n];  // the least exponent that a block is shifted to
                per_unit[n] = power_of_2(23 + core.extra_bits - largest[n]);
                sum[n] = isinf(c[m][n]) ? 0 : double(int32_t(c[m][n] * per_unit[n]));
            }
            for (int k = first; k < first + core.block; ++k)
                for (int n = 0; n < N; ++n) sum[n] += double(int32_t(double(a[m][k]) * b[k][n] * per_unit[n]));
            for (int n = 0; n < N; ++n)
                if (!isinf(c[m][n])) c[m][n] = cut(sum[n] / per_unit[n]);
        }
}

}  // namespace emulator
