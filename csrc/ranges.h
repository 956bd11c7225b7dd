// The constants that keep exponentials and weights in range, for the C++ and the CUDA kernels.
// fastntxent/backends/ranges.py has the constants that Python also needs, and tests/test_numbers.py compares the two
// files. Below, k is the inverse temperature, s a similarity, M the number of rows of the longer side, nu a row's
// log-sum-exp, w the weight of nu in the gradient, and P and G are the matrices of docs/architecture.md.
#pragma once

namespace fntx {

template <class T> constexpr T LOG2_E = T(1.4426950408889634);  // exp(x) = 2^(x log2 e)

// The kernels compute exp(k s) without a shift if k max|s| + ln M is below this limit, which is two thirds of the
// largest argument of exp (88.7 for float, 709.8 for double). The last third is left for products with exp(-nu) and
// with weights. Beyond the limit, logits are shifted by their maximum or by nu.
template <class T> constexpr T DIRECT_LIMIT = sizeof(T) == 4 ? 60 : 480;

// For the CPU kernels. Without a shift, weights are scaled so that the largest w is 1, and exponentials are multiplied
// by factors w exp(-nu). If the factor of any row whose weight is not 0 is smaller than this constant or larger than
// its inverse, the tiles are shifted instead. That leaves three decades at either end of float's range (1.2e-38 to
// 3.4e38), and eight at either end of double's.
template <class T> constexpr double SMALLEST_FACTOR = sizeof(T) == 4 ? 1e-35 : 1e-300;

// For the CPU kernels. With a shift, no w exp(k s - nu) exceeds w, and weights are scaled so that the largest w is this
// value. The value is the geometric mean of 1 and the largest number of the type. It leaves room below for small
// products and room above for sums of large ones.
template <class T> constexpr double LARGEST_WEIGHT = sizeof(T) == 4 ? 0x1p64 : 0x1p512;

// The CUDA kernels scale the weights in a tile of G so that the largest is this number. float16 holds magnitudes from
// 6e-8 to 65504. An element of G is (w_i P_ij + w_j P_ji) times the factor of its column (r in gradient.h). No scaled
// weight exceeds G_SCALE, no P exceeds 1, and the factor is below 2, so |G_ij| stays below 4 G_SCALE = 32768. (In the
// Triton kernels, the factor is at most 1, and the scale for float16 is half of this one.)
constexpr float G_SCALE = 8192;

// The CUDA kernels compute the scale of the weights as G_SCALE / unit. The unit is the call's largest weight, or this
// number if the largest weight is smaller. So nothing is divided by 0 if all weights are 0, and both G_SCALE / unit (at
// most 8e36) and unit / G_SCALE (at least 1.2e-37) are normal floats.
constexpr float SMALLEST_UNIT = 1e-33f;

}  // namespace fntx
